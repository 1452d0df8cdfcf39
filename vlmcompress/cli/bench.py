"""`vlmcompress bench`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmcompress.cli.bench_text import of_model, of_towers
from vlmcompress.cli.options import Clip, Clock, Device, Json, Out
from vlmcompress.cli.output import emit, progress
from vlmcompress.cli.values import keep_of, words
from vlmcompress.loading import REFERENCE, clip_of, device_of, dtype_of, load

_NONE = "none"
_QUESTION = "What is in the picture?"


def bench(
    random_weights: Annotated[
        str | None,
        typer.Option(
            help="A shape with random weights: llava-1.5-1b, llava-1.5-7b, llava-next-7b, "
            "llava-onevision-7b, qwen2.5-vl-7b, or a tiny one."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder, a hub id or 'reference' (the default).")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated; several stages joined by '|'. 'none' is the unpatched model "
            "beside itself."
        ),
    ] = "vtc_cls",
    keeps: Annotated[str, typer.Option(help="Comma-separated.")] = "0.1",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds thrown away.")] = 2,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens generated for the time per token; 0 for none.")
    ] = 16,
    text_tokens: Annotated[
        int, typer.Option(min=2, help="Length of the text prompt of random weights.")
    ] = 64,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture asked about; of the reference model's if not given."),
    ] = None,
    question: Annotated[str, typer.Option(help="What a checkpoint is asked.")] = _QUESTION,
    clip: Clip = None,
    batches: Annotated[
        str | None, typer.Option(help="Batch sizes for images per second, comma-separated.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Requests at once for images per second, comma-separated.")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests that each of those at once makes in a round.")
    ] = 4,
    memory: Annotated[
        bool, typer.Option(help="Peak memory, each configuration in a process of its own.")
    ] = False,
    count: Annotated[
        bool, typer.Option(help="Also count FLOPs by torch, under eager attention.")
    ] = False,
    tower: Annotated[
        bool, typer.Option("--tower", help="Time the vision tower alone, under methods inside it.")
    ] = False,
    clock: Clock = "wall",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time to first token, time per token, memory and FLOPs, against the unpatched model.

    `floor_ratio` at the top is of vtc_cls at keep 0.1, or else of the first configuration.
    """
    if model is not None and random_weights is not None:
        raise typer.BadParameter("give --model or --random-weights, not both")
    configs = _configs(words(methods), words(keeps))
    sizes: dict[str, Any] = {"batches": _sizes(batches), "concurrency": _sizes(concurrency)}
    rounds: dict[str, Any] = {"repeats": repeats, "warmup": warmup}
    if tower:
        name, per_call = random_weights or model or REFERENCE, sizes["batches"] or [1]
        results = _towers(name, random_weights, configs, per_call, dtype, device, rounds, clock)
        emit(results, of_towers(results), as_json, out)
        return
    make = partial(
        subject, random_weights, model, dtype, device, text_tokens, image, question, clip
    )
    loaded, request, text = make()
    asked_text = _text_half(loaded, random_weights, configs) if text is None else text
    options = {"clip": asked_text, "new_tokens": new_tokens}
    results = _timed(loaded, request, configs, options, {**rounds, "count": count, "clock": clock})
    if any(sizes.values()):
        options["new_tokens"] = max(1, new_tokens)
        results["throughput"] = _swept(loaded, request, configs, sizes, requests, options, rounds)
    if memory:
        from eval_harness.memory import peaks

        del loaded, request, asked_text, options
        others = [config for config in configs if config[0] != _NONE]
        results["memory"] = peaks(make, [(_NONE, None), *others])
    emit(results, of_model(results), as_json, out)


def subject(
    shape: str | None,
    name: str | None,
    dtype: str,
    device: str,
    text_tokens: int,
    image: Path | None,
    question: str,
    clip: str | None,
) -> tuple[Any, Any, Any]:
    """Model, request and CLIP of a command line; processes of their own call it too."""
    from eval_harness import build
    from eval_harness import requests as asking

    if shape is not None:
        built = build(shape, dtype_of(dtype), device_of(device))
        return built, asking.of_shape(built, text_tokens=text_tokens), None
    loaded, processor = load(name or REFERENCE, dtype, device)
    loaded.name_or_path = name or REFERENCE
    text = None if clip is None else clip_of(clip, device_of(device))
    return loaded, asking.of_checkpoint(loaded, processor, _picture(image), question), text


def _picture(image: Path | None) -> Any:
    from PIL import Image

    if image is not None:
        with Image.open(image) as found:
            return found.convert("RGB")
    from vlmcompress.reference.data import samples

    return next(iter(samples("test", 1))).image


def _configs(methods: Sequence[str], keeps: Sequence[str]) -> list[tuple[str, Any]]:
    """Every method at every budget; the unpatched model once."""
    found: list[tuple[str, Any]] = []
    for method in methods:
        if method == _NONE:
            found.append((method, None))
        else:
            found += [(method, keep_of(keep)) for keep in keeps]
    return found


def _sizes(text: str | None) -> list[int]:
    from vlmcompress.core.errors import ConfigError

    sizes = [] if text is None else words(text)
    if not all(size.isdigit() and int(size) for size in sizes):
        raise ConfigError(f"Sizes are {text!r}; allowed are counts of 1 or more, such as 1,2,4.")
    return [int(size) for size in sizes]


def _text_half(model: Any, shape: str | None, configs: Sequence[tuple[str, Any]]) -> Any:
    """Random weights of a CLIP text encoder, where a method reads the question."""
    from eval_harness import shapes
    from vlmcompress.methods import pipeline

    reading = any(pipeline.build(m, k).needs().text for m, k in configs if m != _NONE)
    known = shape is not None and model.config.vision_config.model_type == "clip_vision_model"
    return shapes.text_half(model) if reading and known else None


def _timed(
    model: Any,
    request: Any,
    configs: Sequence[tuple[str, Any]],
    options: dict[str, Any],
    rounds: dict[str, Any],
) -> dict[str, Any]:
    from eval_harness import bench as run

    with progress("bench", 2 * len(configs)) as bar:

        def tick(line: str) -> None:
            bar.set_postfix_str(line, refresh=False)
            bar.update()

        results = run(model, request, configs, **options, **rounds, progress=tick)
    if results["floor_ratio"] is None:
        results["floor_ratio"] = results["configs"][0]["floor_ratio"]
    return results


def _swept(
    model: Any,
    request: Any,
    configs: Sequence[tuple[str, Any]],
    sizes: dict[str, Any],
    requests: int,
    options: dict[str, Any],
    rounds: dict[str, Any],
) -> dict[str, Any]:
    from eval_harness.throughput import sweep

    with progress("images per second", sum(map(len, sizes.values()))) as bar:
        return sweep(
            model,
            request,
            configs,
            **sizes,
            requests=requests,
            **options,
            **rounds,
            progress=lambda line: bar.update(),
        )


def _towers(
    name: str,
    shape: str | None,
    configs: Sequence[tuple[str, Any]],
    batches: Sequence[int],
    dtype: str,
    device: str,
    rounds: dict[str, Any],
    clock: str,
) -> dict[str, Any]:
    """One set of results per batch size."""
    from eval_harness import towers

    tower, pixels = towers.subject(name, shape is not None, dtype_of(dtype), device_of(device))
    with progress("bench --tower", len(batches) * len(configs)) as bar:
        found = [
            towers.bench_tower(
                tower,
                pixels.expand(size, -1, -1, -1).contiguous(),
                configs,
                **rounds,
                progress=lambda line: bar.update(),
                clock=clock,  # type: ignore[arg-type]  # checked there
            )
            for size in batches
        ]
    return {"machine": found[0]["machine"], "protocol": found[0]["protocol"], "towers": found}
