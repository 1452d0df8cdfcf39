"""The results of a sweep as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from eval_harness.asking import BLIND, FULL
from eval_harness.statistics import tokdense

_NAMES = {FULL: "all tokens", BLIND: "no picture"}


def of_task(item: tuple[str, dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """Head line, header and rows of a task.

    Args:
        item: its name and results.
    """
    name, task = item
    head = (
        f"{name}: {task['metric']} in %, {task['questions']} questions about {task['images']} "
        "images; 95 % intervals"
    )
    rates = list(dict.fromkeys(rate for row in task["rows"] for rate in row["rates"]))
    failed = any(row["failed"] for row in task["rows"])
    header = ["method", "keep", "tokens", "score", "TokDense", "minus all tokens", "p"]
    header += ["minus random", "p"]
    header += [rate.replace("_", " ") for rate in rates] + (["failed"] if failed else [])
    rows = [
        [*_cells(row), *(_rate(row, rate) for rate in rates), *([str(row["failed"])] * failed)]
        for row in task["rows"]
    ]
    return head, header, rows


def foot(results: dict[str, Any]) -> str:
    """What holds for all tables, and what the harness itself cost."""
    sweep, where, spent = results["sweep"], results["machine"], results["time"]
    lines = [
        "TokDense: score in % per visual token kept, mean over layers.",
        "p: of no difference, signs of images flipped, adjusted over the sweep (Holm).",
        f"{sweep['model']} in {where['dtype']} on {where['device']}, batch {sweep['batch']}, "
        f"positions {sweep['positions']}, seed {sweep['seed']}; the harness took "
        f"{100 * spent['harness_share']:.1f} % of the model's time.",
    ]
    if not results["complete"]:
        lines.insert(0, "Interrupted: these are the answers up to there.")
    return "\n".join(lines)


def mean_kept(row: Mapping[str, Any]) -> float | None:
    """Visual tokens kept of a question, as a mean over the language model's layers; None if none.

    Args:
        row: of a task's results.
    """
    layers = row["visual_layers"]
    return (fmean(layers) if layers else row["tokens"].get("visual_kept")) or None


def density(row: Mapping[str, Any]) -> str:
    """TokDense of a row, `-` without answers or visual tokens."""
    kept, score = mean_kept(row), row["score"]
    return "-" if kept is None or score is None else f"{tokdense(score['mean'], kept):.2f}"


def _cells(row: dict[str, Any]) -> list[str]:
    tokens = row["tokens"].get("visual_kept")
    return [
        _NAMES.get(row["method"], row["method"]),
        "" if row["keep"] is None else str(row["keep"]),
        "-" if tokens is None else f"{tokens:.1f}",
        _estimate(row["score"], "{:.1f}"),
        density(row),
        *_difference(row["over_full"]),
        *_difference(row["over_random"]),
    ]


def _difference(found: dict[str, Any] | None) -> list[str]:
    p = (found or {}).get("p_holm")
    return [_estimate(found, "{:+.1f}"), "-" if p is None else f"{p:.3f}"]


def _estimate(found: dict[str, Any] | None, form: str) -> str:
    if found is None:
        return "-"
    mean, low, high = (form.format(100 * found[name]) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _rate(row: dict[str, Any], rate: str) -> str:
    return f"{100 * row['rates'][rate]:.1f}" if rate in row["rates"] else "-"
