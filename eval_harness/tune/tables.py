"""What `tune` has found, as tables."""

from __future__ import annotations

from typing import Any


def finalists(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the pipelines that were tested on samples that the search did not see."""
    header = ["pipeline", "cost", "kept %", "at least %", "p", "images"]
    rows = [
        [
            row["pipeline"],
            f"{row['cost']:.3f}",
            _percent(row["kept"]),
            _percent(row["kept_at_least"]),
            f"{row['p']:.2g}",
            str(row["images"]),
        ]
        for row in results["finalists"]
    ]
    return header, rows


def cheapest(results: dict[str, Any], n: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the `n` pipelines that cost least, with what became of each."""
    header = ["cheapest pipelines", "cost", "images", "kept %", "decision"]
    rows = [
        [
            row["pipeline"],
            "-" if row["cost"] is None else f"{row['cost']:.3f}",
            str(row["images"]),
            _percent(row["kept"]),
            row["decision"],
        ]
        for row in results["space"][:n]
    ]
    return header, rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
