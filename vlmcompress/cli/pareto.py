"""`vlmcompress pareto`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmcompress.cli.options import Clock, Device, Json, TextQuestions, Weights
from vlmcompress.cli.output import emit, progress, table
from vlmcompress.cli.values import keep_of, words
from vlmcompress.loading import REFERENCE, device_of, dtype_of, location


def pareto(
    out: Annotated[Path, typer.Option(help="JSON to write; parts are kept beside it.")],
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to draw.")] = None,
    questions: Annotated[
        int, typer.Option(min=0, help="Questions about objects; 0 for none.")
    ] = 400,
    text_questions: TextQuestions = 200,
    towers: Annotated[
        str, typer.Option(help="Settings inside the tower, separated by ';'; a set where not given")
    ] = "",
    connectors: Annotated[str, typer.Option(help="Comma-separated methods after the tower.")] = (
        "vtc_cls,divprune"
    ),
    keeps: Annotated[str, typer.Option(help="Comma-separated shares of an image.")] = "0.1",
    random_weights: Annotated[
        str, typer.Option(help="The shape that is timed: llava-1.5-7b, llava-1.5-1b or tiny.")
    ] = "llava-1.5-1b",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Device = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    clock: Clock = "wall",
    weights: Weights = REFERENCE,
    processes: Annotated[
        int, typer.Option(min=1, help="One-thread processes for the questions.")
    ] = 2,
    as_json: Json = False,
) -> None:
    """Accuracy against time to first token over methods in the tower and after it; resumable.

    Times are of a shape with random weights, accuracy is the reference model's at the same share of
    tokens. A method in the tower is written with its budget, such as 'evit:0.35'. Times are kept
    when the reference's weights change.
    """
    from eval_harness.pareto import parts_of, sweep
    from eval_harness.pareto_plan import TOWERS, Plan
    from eval_harness.pareto_rounds import Timing
    from eval_harness.plots import plot_pareto

    dtype_of(dtype)  # so that a wrong one is refused before anything is measured
    timing = Timing(random_weights, dtype, str(device_of(device)), clock)  # type: ignore[arg-type]
    asked = {"objects": questions, "text": text_questions}
    plan = Plan(
        questions={world: k for world, k in asked.items() if k},
        towers=tuple(part.strip() for part in towers.split(";")) if towers else TOWERS,
        connectors=tuple(words(connectors)),
        keeps=tuple(keep_of(k) for k in words(keeps)),  # type: ignore[misc]  # checked there
        timing=timing,
        rounds=rounds,
    )
    folder = Path(location(weights))
    with progress("parts", parts_of(plan, folder)) as bar:

        def tick(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        results = sweep(
            plan,
            out.with_suffix(".parts"),
            weights=folder,
            processes=processes,
            progress=tick,
        )
    if plot is not None:
        plot_pareto(results, plot)
    emit(results, text(results), as_json, out)


def text(results: dict[str, Any]) -> str:
    """The tables for a reader."""
    from eval_harness import pareto_tables

    tables = (pareto_tables.points(results), pareto_tables.towers(results))
    return "\n\n".join([*(table(*rows) for rows in tables), pareto_tables.goal(results)])
