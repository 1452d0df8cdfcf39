"""How well [CLS] attention finds what is drawn, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vlmcompress.core.extras import require

from .batches import pixels_of
from .model import cls_attention
from .scenes import OBJECT_SHARE, Drawn, Split
from .worlds import world as find_world

_BATCH = 32


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each row; ties count half.

    Args:
        scores: ``[b, n]``.
        positive: ``[b, n]`` bool; each row has both values.

    Returns:
        ``[b]``: the chance that a positive place has a higher score than a negative one.
    """
    ranks = require("scipy.stats").rankdata(scores, axis=1)
    hits = positive.sum(axis=1)
    misses = positive.shape[1] - hits
    return ((ranks * positive).sum(axis=1) - hits * (hits + 1) / 2) / (hits * misses)


@torch.no_grad()
def _attention(tower: Any, scenes: Sequence[Drawn]) -> Tensor:
    """[CLS] attention to the patches in every layer, ``[layers, b, 196]``, mean over heads."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels_of(scenes)))
    rows = []
    for layer in tower.encoder.layers:
        rows.append(cls_attention(layer, hidden)[:, 1:])
        hidden = layer(hidden, None)
    return torch.stack(rows)


def detector_quality(
    model: LlavaForConditionalGeneration,
    *,
    world: str = "objects",
    scenes: int = 400,
    split: str = "test",
) -> dict[str, Any]:
    """Read [CLS] attention as a detector of object patches.

    A patch counts as an object's when at least a tenth of it is covered.

    Args:
        model: the reference model, float32, on the CPU.
        world: see `vlmcompress.reference.samples`.
        scenes: how many.
        split: where they come from.

    Returns:
        JSON-ready: ``scenes``, ``area`` (share of the patches that are objects'), and ``layers``:
        one dict per tower layer, from the first on, and one for the mean of the three before the
        last, with ``layer`` (counted from the end, or ``"mean"``), ``auc`` (mean over scenes of the
        area under the ROC curve) and ``mass`` (share of the attention on object patches).
    """
    sort, chosen = find_world(world), Split.named(split)
    attention, covered = [], []
    for first in range(0, scenes, _BATCH):
        drawn = [sort.draw(chosen, i) for i in range(first, min(scenes, first + _BATCH))]
        attention.append(_attention(model.model.vision_tower, drawn).numpy())
        covered.append(np.stack([one.coverage >= OBJECT_SHARE for one in drawn]))
    rows, objects = np.concatenate(attention, axis=1), np.concatenate(covered)
    names = [*range(-len(rows), 0), "mean"]
    scores = [*rows, rows[-4:-1].mean(axis=0)]
    return {
        "scenes": scenes,
        "area": float(objects.mean()),
        "layers": [
            {
                "layer": name,
                "auc": float(area_under_curve(row, objects).mean()),
                "mass": float((row * objects).sum(axis=1).mean()),
            }
            for name, row in zip(names, scores, strict=True)
        ],
    }
