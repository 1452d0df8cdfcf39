"""Quick validation during training: accuracy per kind, whole and compressed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .batches import Batch, Encoder, make_batch
from .language import judge, run_llm
from .model import TowerStates, run_tower
from .scenes import PATCHES, Split
from .selection import score_patches, top
from .worlds import ALL_KINDS, OBJECTS, TEXTS

SETTINGS = (
    ("all", PATCHES, False),
    ("cls", 20, True),
    ("cls", 20, False),
    ("random", 20, True),
)
_EVEN = np.ones(len(ALL_KINDS))


def _answers(
    model: LlavaForConditionalGeneration,
    states: TowerStates,
    tokens: Tensor,
    batch: Batch,
    setting: tuple[str, int, bool],
) -> tuple[np.ndarray, np.ndarray]:
    """Right answers and questions per kind under one setting."""
    how, keep, contiguous = setting
    attention = states.attention[-2][:, 1:]
    share = batch.labels["share"].to(tokens.device)
    draw = torch.Generator().manual_seed(batch.scenes[0].scene_id % 2**40)
    score = torch.ones_like(share)
    if how != "all":
        score = score_patches(how, attention, share, draw)
    kept = top(score, keep)
    tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
    packed = batch.packed.to(tokens.device)
    logits, target, _ = run_llm(model, tokens, kept, packed, contiguous)
    right, kinds = judge(logits, target, packed)
    total = len(ALL_KINDS)
    return np.bincount(kinds, right, minlength=total), np.bincount(kinds, minlength=total)


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration,
    encode: Encoder,
    scenes: int = 64,
    split: Split = Split.VALIDATION,
) -> dict[str, dict[str, float]]:
    """Accuracy per kind, and its unweighted mean over each world, for each setting.

    Args:
        model: the reference model.
        encode: the tokenizer's memory.
        scenes: how many; each is asked up to twelve questions. A quarter is text-heavy.
        split: where they come from.
    """
    total = len(ALL_KINDS)
    counts = {s: [np.zeros(total), np.zeros(total)] for s in SETTINGS}
    device = model.device
    for first in range(0, scenes, 16):
        indices = range(first, min(scenes, first + 16))
        batch = make_batch(split, indices, 12, _EVEN, encode, text_share=0.25)
        states = run_tower(model.model.vision_tower, batch.pixels().to(device), None)
        tokens = model.model.multi_modal_projector(states.hidden[-2][:, 1:])
        for setting, sums in counts.items():
            for row, part in zip(
                sums, _answers(model, states, tokens, batch, setting), strict=True
            ):
                row += part
    table = {}
    for (how, keep, contiguous), (right, asked) in counts.items():
        name = f"{how}@{keep}" + ("" if how == "all" or contiguous else "-original")
        table[name] = _rates(right, asked)
    return table


def _rates(right: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    rate = dict(zip(ALL_KINDS, (right / np.maximum(asked, 1)).tolist(), strict=True))
    means = {
        name: float(np.mean([rate[kind] for kind in kinds]))
        for name, kinds in (("mean", OBJECTS.kinds), ("text", TEXTS.kinds))
    }
    return {k: round(v, 4) for k, v in {**means, **rate}.items()}
