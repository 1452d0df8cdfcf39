"""The learning curve of a training run, short enough to keep beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

from .questions import KINDS

_TOWER = ("colour", "shape", "glyph", "recall-2", "mass-4", "mass-3", "mass-2")


def _point(row: dict) -> dict:
    """One row of the log, without what only debugging needs."""
    point = {k: row[k] for k in ("stage", "step")}
    point["minutes"] = round(row["minutes"], 1)
    if "validation" in row:
        return {**point, "validation": row["validation"]}
    means = row["means"]
    if row["stage"] == "tower":
        return {**point, "patches": {k: means[k] for k in _TOWER if k in means}}
    return {**point, "training": dict(zip(KINDS, row["kinds"], strict=True))}


def learning_curve(log: str | Path, every: float = 2.0) -> list[dict]:
    """Thin out a run's ``log.jsonl``.

    Args:
        log: the file.
        every: minutes between two points of a stage; validations are all kept.

    Returns:
        Points with stage, step, minutes of that stage, and either the accuracy per patch label
        (tower), the running training accuracy per kind, or the validation accuracy per kind at
        whole and compressed settings.
    """
    points: list[dict] = []
    last: dict[str, float] = {}
    for line in Path(log).read_text().splitlines():
        row = json.loads(line)
        kept = "validation" in row
        if not kept and row["minutes"] - last.get(row["stage"], -every) >= every:
            last[row["stage"]] = row["minutes"]
            kept = True
        if kept:
            points.append(_point(row))
    return points
