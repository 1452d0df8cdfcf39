"""`vlmcompress demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmcompress.cli.options import Json, Weights
from vlmcompress.cli.output import emit, progress, write
from vlmcompress.loading import REFERENCE, load


def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures and results.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer questions and budgets.")] = False,
    scene: Annotated[int, typer.Option(min=0, help="Which held-out scene is shown.")] = 0,
    weights: Weights = REFERENCE,
    seed: Annotated[int, typer.Option(help="Of random methods and intervals.")] = 0,
    as_json: Json = False,
) -> None:
    """See it work, offline: one scene, three questions, and accuracy against tokens kept.

    Writes kept.png, curve.png and results.json.
    """
    from vlmcompress import demo as demos

    model, processor = load(weights, device="cpu")
    plan = demos.QUICK if quick else demos.FULL
    with progress("demo", plan.steps) as bar:
        results = demos.run(
            model, processor, out, plan=plan, scene=scene, seed=seed, tick=bar.update
        )
    write(results, out / "results.json")
    emit(results, demos.text(results, out), as_json)
