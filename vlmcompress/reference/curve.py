"""What a training run leaves behind: its learning curve and its accuracy on the test split."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from .batches import Encoder
from .scenes import Split
from .tokenizer import build_tokenizer
from .validate import validate
from .worlds import ALL_KINDS

TRAINING_LOG = Path(__file__).parent / "training_log.json"
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
    known = zip(ALL_KINDS, row["kinds"], strict=False)  # an earlier run may know fewer kinds
    return {**point, "training": dict(known)}


def _rows(log: str | Path) -> list[dict]:
    """Rows of a log; those that a resumed run repeated, or a kill cut off, are left out."""
    rows: list[dict] = []
    for line in Path(log).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        stage, step = row["stage"], row["step"]
        rows = [r for r in rows if r["stage"] != stage or r["step"] <= step]
        rows.append(row)
    return rows


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
    rows = _rows(log)
    ends = {row["stage"]: i for i, row in enumerate(rows)}
    for i, row in enumerate(rows):
        kept = "validation" in row or i == ends[row["stage"]]
        if not kept and row["minutes"] - last.get(row["stage"], -every) >= every:
            last[row["stage"]] = row["minutes"]
            kept = True
        if kept:
            points.append(_point(row))
    return points


def _stages(curve: list[dict]) -> dict[str, dict]:
    """Minutes and steps that each stage took."""
    last = {point["stage"]: point for point in curve}
    return {name: {k: point[k] for k in ("minutes", "step")} for name, point in last.items()}


def training_log(
    run: str | Path, weights: str | Path, scenes: int, start: str | Path | None = None
) -> dict:
    """Summarise a run.

    Args:
        run: folder of the run, with ``log.jsonl``.
        weights: the exported folder, whose bfloat16 weights are measured in float32.
        scenes: of the test split, twelve questions each.
        start: folder of the run that this one went on from.

    Returns:
        Parameters, minutes and steps per stage, test accuracy per setting and kind, the learning
        curve, and in ``before`` stages and curve of the run that it went on from, if any.
    """
    earlier = [learning_curve(Path(start) / "log.jsonl")] if start is not None else []
    curve = learning_curve(Path(run) / "log.jsonl")
    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32).eval()
    table = validate(model, Encoder(build_tokenizer()), scenes, Split.TEST)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "stages": _stages(curve),
        "test_scenes": scenes,
        "test": table,
        "curve": curve,
        "before": [{"stages": _stages(points), "curve": points} for points in earlier],
    }
