"""`vlmcompress bench`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vlmcompress.cli.output import Json, Out, emit, progress, table
from vlmcompress.cli.values import REFERENCE, device_of, dtype_of, keep_of, load, words


def bench(
    random_weights: Annotated[
        str | None,
        typer.Option(help="A shape with random weights: llava-1.5-7b, llava-1.5-1b or tiny."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder, a hub id or 'reference' (the default).")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; several stages joined by '|'.")
    ] = "vtc_cls",
    keeps: Annotated[str, typer.Option(help="Comma-separated.")] = "0.1",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds thrown away.")] = 2,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens generated for the time per token; 0 for none.")
    ] = 16,
    text_tokens: Annotated[int, typer.Option(min=2, help="Length of the text prompt.")] = 64,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: processor time, for one thread on a busy machine.")
    ] = "wall",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time to first token, time per token, memory and FLOPs, against the unpatched model.

    `floor_ratio` at the top is of vtc_cls at keep 0.1, or else of the first configuration.
    """
    from eval_harness import bench as run
    from eval_harness import example_inputs

    if model is not None and random_weights is not None:
        raise typer.BadParameter("give --model or --random-weights, not both")
    configs = [(m, keep_of(k)) for m in words(methods) for k in words(keeps)]
    loaded = _model(model, random_weights, dtype, device)
    inputs = example_inputs(loaded, text_tokens=text_tokens)
    with progress("bench", 2 * len(configs)) as bar:

        def tick(line: str) -> None:
            bar.set_postfix_str(line, refresh=False)
            bar.update()

        results = run(
            loaded,
            inputs,
            configs,
            repeats=repeats,
            warmup=warmup,
            new_tokens=new_tokens,
            progress=tick,
            clock=clock,  # type: ignore[arg-type]  # checked there
        )
    if results["floor_ratio"] is None:
        results["floor_ratio"] = results["configs"][0]["floor_ratio"]
    emit(results, _text(results), as_json, out)


def _model(name: str | None, shape: str | None, dtype: str, device: str) -> Any:
    if shape is not None:
        from eval_harness import build

        return build(shape, dtype_of(dtype), device_of(device))
    from vlmcompress.core.errors import UnsupportedModelError

    model, _ = load(name or REFERENCE, dtype, device)
    kind, tower = model.config.model_type, model.config.vision_config.model_type
    if kind != "llava" or tower == "pixtral":
        raise UnsupportedModelError(
            f"bench makes its own inputs for LLaVA models with square images; {name!r} is {kind} "
            f"with a {tower}. Call eval_harness.bench with inputs of its processor."
        )
    return model


def _text(results: dict[str, Any]) -> str:
    first = results["configs"][0]["baseline"]
    rows = [["unpatched", "-", str(first["tokens"]), *_cells(first), "-", "-", "-"]]
    for row in results["configs"]:
        ideal = row["ideal_ratio"]
        ratios = [f"{row['speedup']:.2f}", f"{row['floor_ratio']:.3f}"]
        ratios.append("-" if ideal is None else f"{ideal:.3f}")
        rows.append([row["method"], str(row["keep"]), str(row["tokens"]), *_cells(row), *ratios])
    header = ["method", "keep", "tokens", "TTFT ms", "TPOT ms", "KV MiB", "speed-up", "floor ratio"]
    header.append("ideal ratio")
    machine = results["machine"]
    where = (
        f"{machine['shape']} in {machine['dtype']} on {machine['device']} ({machine['cpu']}), "
        f"torch {machine['torch']}"
    )
    return f"{table(header, rows)}\n\n{where}"


def _cells(row: dict[str, Any]) -> list[str]:
    tpot = row["tpot"]
    return [
        f"{1000 * row['ttft']['median']:.1f}",
        "-" if tpot is None else f"{1000 * tpot:.1f}",
        f"{row['kv_bytes'] / 2**20:.2f}",
    ]
