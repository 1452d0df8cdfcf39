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
    header = ["model", "method", "at once", "requests/s", "ratio", "TTFT", "ratio", "TPOT", "ratio"]
    whole = {row["model"]: row["by_concurrency"] for row in results["rows"] if not row["method"]}
    rows = []
    for row in results["rows"]:
        for n, found in row["by_concurrency"].items():
            base = whole[row["model"]][n]
            name = f"`{row['method']}`" if row["method"] else "whole images"
            figures = [
                *(f"{found['requests_per_s']:.2f}", _ratio(row, base, found, "requests_per_s")),
                *(f"{1000 * found['ttft_s']:.0f} ms", _ratio(row, base, found, "ttft_s")),
                *(f"{1000 * found['tpot_s']:.1f} ms", _ratio(row, base, found, "tpot_s")),
            ]
            rows.append([f"`{row['model']}`", name, n, *figures])
    return header, rows


def _ratio(row: dict[str, Any], base: dict[str, float], found: dict[str, float], name: str) -> str:
    return f"{found[name] / base[name]:.2f}" if row["method"] else ""


def versions(results: dict[str, Any]) -> str:
    """What ran, in a line."""
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())
