"""What a training run leaves behind: its learning curve, its accuracy on the test split, a card."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from .batches import Encoder
from .questions import KINDS
from .scenes import Split
from .text_questions import TEXT_KINDS
from .tokenizer import build_tokenizer
from .validate import validate
from .worlds import ALL_KINDS

TRAINING_LOG = Path(__file__).parent / "training_log.json"
_CARD = """
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [vlmcompress, llava, synthetic]
---

# The reference vision-language model

A `LlavaForConditionalGeneration` of {parameters} parameters (CLIP tower 8 x 192 at 224 px, Llama
8 x 192 with grouped-query attention), trained from scratch on two CPU cores on drawn scenes, with a
CLIP text head in `text_head/`. It is there to test and to demonstrate compression on any machine in
seconds. It knows nothing but its eight kinds of questions about coloured shapes.

Read its curves with care:

- [CLS] was taught to attend to the objects (a direct loss, layers -4 to -1), so methods that read
  [CLS] attention are near an oracle here. They are not on released models.
- A part of the training steps dropped image tokens, by [CLS] attention, by coverage or at random,
  with original and with renumbered positions. It tolerates compression better than models that
  never saw any.
- Patches were taught to name the object they show, so little of an object leaks into the ground:
  random selection looks worse than on released models.

`all@196` keeps every token; `cls@20` keeps the 20 with the highest [CLS] attention of layer -2,
renumbered (`-original`: with their own positions); `random@20` keeps 20 at random.
"""
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
    return {**point, "training": dict(zip(ALL_KINDS, row["kinds"], strict=True))}


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


def training_log(run: str | Path, weights: str | Path, scenes: int) -> dict:
    """Summarise a run.

    Args:
        run: folder of the run, with ``log.jsonl``.
        weights: the exported folder, whose bfloat16 weights are measured in float32.
        scenes: of the test split, twelve questions each.

    Returns:
        Parameters, minutes and steps per stage, test accuracy per setting and kind, and the
        learning curve.
    """
    curve = learning_curve(Path(run) / "log.jsonl")
    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32).eval()
    table = validate(model, Encoder(build_tokenizer()), scenes, Split.TEST)
    last = {point["stage"]: point for point in curve}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "stages": {name: {k: p[k] for k in ("minutes", "step")} for name, p in last.items()},
        "test_scenes": scenes,
        "test": table,
        "curve": curve,
    }


def card(log: dict) -> str:
    """The model card, in Markdown, from a run's summary."""
    head = _CARD.strip().replace("{parameters}", f"{log['parameters'] / 1e6:.1f} M")
    columns = ("mean", *KINDS, "text", *TEXT_KINDS)
    lines = [
        head,
        "",
        "| tokens | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for setting, row in log["test"].items():
        cells = [f"{100 * row[k]:.1f}" for k in columns]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    minutes = ", ".join(f"{n} {s['minutes']:.0f} min" for n, s in log["stages"].items())
    asked = f"{log['test_scenes']} scenes of the test split, twelve questions each"
    notes = [line for note in log.get("notes", []) for line in ("", note)]
    measured = f"Accuracy in %, on {asked}. Training time: {minutes}."
    return "\n".join([*lines, "", measured, *notes, ""])
