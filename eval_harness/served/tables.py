"""What was measured on a real engine, as tables."""

from __future__ import annotations

from typing import Any

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def equality(results: dict[str, Any]) -> Table:
    """Methods by model: answers that are equal to the end, and tokens of all prompts."""
    header = ["model", "method", "prompts", "equal to the end", "prompt tokens", "whole"]
    rows = [
        [
            f"`{case['model']}`",
            f"`{case['method']}`",
            str(case["prompts"]),
            f"{100 * case['equal'] / case['prompts']:.1f} %",
            f"{case['prompt_tokens']:,}",
            f"{case['prompt_tokens_full']:,}",
        ]
        for case in results["cases"]
    ]
    return header, rows


def load(results: dict[str, Any]) -> Table:
    """Figures with compression over those without, at every concurrency."""
    header = ["model", "method", "at once", "requests/s", "TTFT", "TPOT"]
    whole = {row["model"]: row["by_concurrency"] for row in results["rows"] if not row["method"]}
    names = ("requests_per_s", "ttft_s", "tpot_s")
    rows = [
        [
            f"`{row['model']}`",
            f"`{row['method']}`",
            n,
            *(f"{found[name] / whole[row['model']][n][name]:.2f}" for name in names),
        ]
        for row in results["rows"]
        if row["method"]
        for n, found in row["by_concurrency"].items()
    ]
    return header, rows


def versions(results: dict[str, Any]) -> str:
    """What ran, in a line."""
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())
