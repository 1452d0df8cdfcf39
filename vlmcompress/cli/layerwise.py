"""`vlmcompress eval schedules`: methods inside the language model at equal averages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmcompress.cli.output import Json, emit, progress, table
from vlmcompress.cli.values import REFERENCE, location, words


def schedules(
    out: Annotated[Path, typer.Option(help="JSON to write; parts are kept in build/.")],
    questions: Annotated[int, typer.Option(min=1, help="About objects, of the test split.")] = 2000,
    methods: Annotated[str, typer.Option(help="Comma-separated; every one if not given.")] = "",
    budgets: Annotated[
        str, typer.Option(help="Means over layers of the share of visual tokens.")
    ] = "0.75,0.5,0.25",
    adapters: Annotated[
        str, typer.Option(help="Comma-separated folders of methods with thresholds of their own.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of random dropping.")] = 3,
    weights: Annotated[
        str, typer.Option(help="Folder of a model trained on the scenes.")
    ] = REFERENCE,
    processes: Annotated[int, typer.Option(min=1, help="One-thread processes.")] = 2,
    parts: Annotated[
        Path | None, typer.Option(help="Where parts are kept; build/NAME.parts if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Accuracy of schedules inside the language model that cost the same; goes on when stopped."""
    from eval_harness import layerwise
    from eval_harness.comparison import save

    plan = layerwise.Plan(
        questions=questions,
        methods=tuple(words(methods)) if methods else layerwise.schedules(),
        budgets=tuple(float(budget) for budget in words(budgets)),
        adapters=tuple(words(adapters)),
        seeds=seeds,
    )
    with progress("parts", 1 + len(plan.specs())) as bar:
        results = layerwise.study(
            plan,
            parts or Path("build") / f"{out.stem}.parts",
            weights=location(weights),
            processes=processes,
            progress=lambda _name: bar.update(),
        )
    save(results, out)
    emit(results, _text(results), as_json)


def _text(results: dict[str, Any]) -> str:
    from eval_harness.layerwise_tables import rows

    head = (
        f"{results['questions']} questions about {results['images']} scenes; accuracy in %, 95 % "
        f"interval; {100 * results['full'][0]:.1f} with all tokens, "
        f"{100 * results['blind'][0]:.1f} without the image"
    )
    return f"{head}\n\n{table(*rows(results))}"
