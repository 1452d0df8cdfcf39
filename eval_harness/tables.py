"""The comparison of all methods as Markdown tables."""

from __future__ import annotations

from typing import Any

from eval_harness.statistics import tokdense
from vlmcompress.reference.card import markdown

WORSE, BELOW = "▼", "▽"
LEGEND = (
    f"{WORSE}: a published method that does worse than `random` here (the whole interval of the "
    f"paired difference lies below 0). {BELOW}: its mean is below that of `random`, and the "
    "interval holds 0. `-`: the library refuses the setting, or there is no such number"
)
_KEEPS = ("0.1", "0.05")  # of the short table
_MODES = {"contiguous": "positions renumbered", "original": "original positions"}


def report(results: dict[str, Any]) -> str:
    """Every table, under headings."""
    parts = [summary_table(results)]
    for world, found in results["worlds"].items():
        for mode in found["accuracy"]:
            asked = f"{found['questions']} questions about {found['images']} images"
            parts.append(f"### {world}, {_MODES.get(mode, mode)} ({asked})")
            parts.append(accuracy_table(results, world, mode))
    return "\n\n".join(parts)


def summary_table(results: dict[str, Any]) -> str:
    """One row per method: small budgets in all worlds, difference to random, and speed."""
    worlds, mode = results["worlds"], results["plan"]["positions"][0]
    keeps = [keep for keep in _KEEPS if float(keep) in results["plan"]["keeps"]]
    columns = [(world, keep) for world in worlds for keep in keeps]
    header = ["method", "stage"]
    for world, keep in columns:
        header += [f"{world}, keep {keep}", "minus `random`"]
    dense = [(world, keep) for world, keep in columns if "tokens" in results and keep == keeps[-1]]
    header += [f"TokDense, {world}, keep {keep}" for world, keep in dense]
    header += ["evidence + selection, ms", "TTFT ratio"]
    rows = []
    for method, facts in results["methods"].items():
        row = [f"`{method}`", "control" if facts["control"] else facts["stage"]]
        for world, keep in columns:
            over = worlds[world]["over_random"][mode][keep].get(method)
            row += [_cell(results, world, mode, keep, method), _points(over)]
        row += [_tokdense(results, world, mode, keep, method) for world, keep in dense]
        rows.append([*row, *_speed(results, method)])
    return markdown(header, rows)


def accuracy_table(results: dict[str, Any], world: str, mode: str) -> str:
    """Method x keep of one world and position mode, with 95 % intervals."""
    found = results["worlds"][world]
    keeps = list(found["accuracy"][mode])
    dense = keeps[-1:] if "tokens" in results else []
    rows = [["all tokens", *(_percent(found["full"]) for _ in keeps), *("-" for _ in dense)]]
    rows += [
        [
            f"`{method}`",
            *(_cell(results, world, mode, keep, method) for keep in keeps),
            *(_tokdense(results, world, mode, keep, method) for keep in dense),
        ]
        for method in results["methods"]
    ]
    rows.append(["no image", *(_percent(found["blind"]) for _ in keeps), *("-" for _ in dense)])
    named = (*(f"keep {keep}" for keep in keeps), *(f"TokDense, keep {keep}" for keep in dense))
    return markdown(["method", *named], rows)


def mark(results: dict[str, Any], world: str, mode: str, keep: str, method: str) -> str:
    """`WORSE` or `BELOW` where a published method does not reach random; otherwise empty."""
    over = results["worlds"][world]["over_random"][mode][keep].get(method)
    if over is None or results["methods"][method]["control"]:
        return ""
    mean, _, high = over
    return WORSE if high < 0 else BELOW if mean < 0 else ""


def _cell(results: dict[str, Any], world: str, mode: str, keep: str, method: str) -> str:
    estimate = results["worlds"][world]["accuracy"][mode][keep].get(method)
    if estimate is None:
        return "-"
    return " ".join(filter(None, [_percent(estimate), mark(results, world, mode, keep, method)]))


def _tokdense(results: dict[str, Any], world: str, mode: str, keep: str, method: str) -> str:
    """Of a method at a budget; `-` where it was refused, and for oracles."""
    estimate = results["worlds"][world]["accuracy"][mode][keep].get(method)
    tokens = results["tokens"].get(method, {}).get(keep)
    return "-" if estimate is None or tokens is None else f"{tokdense(estimate[0], tokens):.2f}"


def _speed(results: dict[str, Any], method: str) -> list[str]:
    """Milliseconds of evidence and selection, and the ratio with its range."""
    row = (results["speed"] or {"methods": {}})["methods"].get(method)
    if row is None:
        return ["-", "-"]
    inside = row["selection_ms"] is None
    spent = "in the tower" if inside else f"{row['selection_ms'] + (row['evidence_ms'] or 0):.1f}"
    low, high = row["ttft_range"]
    return [spent, f"{row['ttft_ratio']:.2f} ({low:.2f}-{high:.2f})"]


def _percent(estimate: list[float]) -> str:
    mean, low, high = (100 * value for value in estimate)
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


def _points(estimate: list[float] | None) -> str:
    if estimate is None:
        return "-"
    mean, low, high = (100 * value for value in estimate)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
