"""`vlmcompress eval retrieval`: methods inside the tower of the reference model's CLIP."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vlmcompress.cli.options import Device, Json, Out
from vlmcompress.cli.output import emit, progress, table
from vlmcompress.cli.values import keep_of, words
from vlmcompress.loading import REFERENCE, load


def retrieval(
    images: Annotated[int, typer.Option(min=1, help="Scenes.")] = 1000,
    methods: Annotated[
        str, typer.Option(help="Separated by semicolons; all that learn nothing if not given.")
    ] = "",
    keeps: Annotated[str, typer.Option(help="Comma-separated.")] = "0.75,0.5,0.25,0.1",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    weights: Annotated[str, typer.Option(help="Folder of the model, or reference.")] = REFERENCE,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    device: Device = "auto",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Zero-shot retrieval of colours and shapes by a CLIP model, against its tower's FLOPs."""
    from pathlib import Path

    from eval_harness.retrieval import retrieve
    from vlmcompress.core.errors import ConfigError
    from vlmcompress.methods.inside import names_inside
    from vlmcompress.reference.exporting import TEXT_HEAD
    from vlmcompress.reference.scenes import Split, scene
    from vlmcompress.reference.text_head import TextHead
    from vlmcompress.reference.weights import WEIGHTS_DIR

    kept = [keep_of(keep) for keep in words(keeps)]
    if "auto" in kept:
        raise ConfigError("keep is 'auto'; inside a tower it is a fraction or a count.")
    names = words(methods, ";") if methods else names_inside(cls=True)
    model, processor = load(weights, device=device)
    folder = WEIGHTS_DIR if weights == REFERENCE else Path(weights)
    chosen = Split.named(split)
    with progress("configurations", len(names) * len(kept)) as bar:
        results = retrieve(
            model,
            processor,
            TextHead.load(folder / TEXT_HEAD).to(model.device),
            [scene(chosen, index) for index in range(images)],
            methods=names,
            keeps=[keep for keep in kept if not isinstance(keep, str)],
            seed=seed,
            progress=lambda _line: bar.update(),
        )
    emit({**results, "split": split}, _text(results), as_json, out)


def _text(results: dict[str, Any]) -> str:
    from eval_harness.retrieval import rows

    head = (
        f"{results['questions']} attributes of {results['images']} scenes; accuracy in %, 95 % "
        f"interval; by chance {100 * results['chance']:.1f}"
    )
    return f"{head}\n\n{table(*rows(results))}"
