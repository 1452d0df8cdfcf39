"""`vlmcompress bench-selection`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vlmcompress.cli.options import Clock, Device, Json, Out
from vlmcompress.cli.output import emit, progress, table
from vlmcompress.cli.values import keep_of, words
from vlmcompress.loading import device_of, dtype_of


def bench_selection(
    methods: Annotated[str | None, typer.Option(help="Comma-separated; all if not given.")] = None,
    keeps: Annotated[str, typer.Option(help="Comma-separated.")] = "0.1",
    random_weights: Annotated[
        str, typer.Option(help="The shape whose tower is run.")
    ] = "llava-1.5-7b",
    views: Annotated[int, typer.Option(min=1, help="Views of the image.")] = 5,
    dtype: Annotated[str, typer.Option(help="Of the tower; selection is in float32.")] = "bfloat16",
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds thrown away.")] = 1,
    clock: Clock = "wall",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time that methods take to choose tokens, as a share of the tower's."""
    from eval_harness import selection

    names = selection.methods() if methods is None else words(methods)
    budgets = [keep_of(k) for k in words(keeps)]
    with progress("bench-selection", (len(names) * len(budgets) + 1) * (repeats + warmup)) as bar:
        results = selection.measure(
            names,
            budgets,
            shape=random_weights,
            views=views,
            dtype=dtype_of(dtype),
            device=device_of(device),
            repeats=repeats,
            warmup=warmup,
            clock=clock,  # type: ignore[arg-type]  # checked there
            progress=bar.update,
        )
    emit(results, _text(results), as_json, out)


def _text(results: dict[str, Any]) -> str:
    rows = [
        [
            row["method"],
            str(row["keep"]),
            f"{1000 * row['seconds']['median']:.1f}",
            f"{100 * row['share']:.2f}",
        ]
        for row in results["methods"]
    ]
    machine, protocol = results["machine"], results["protocol"]
    tower = (
        f"{machine['shape']}'s tower on {protocol['views']} views in {machine['dtype']}: "
        f"{1000 * results['tower']['median']:.1f} ms ({protocol['clock']} clock), "
        f"{machine['threads']} threads"
    )
    return f"{table(['method', 'keep', 'ms', '% of tower'], rows)}\n\n{tower}"
