"""Quick validation during training: accuracy per kind, whole and compressed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .batches import Batch, Encoder, make_batch
from .language import run_llm
from .model import TowerStates, run_tower
from .questions import KINDS
from .scenes import PATCHES, Split
from .selection import score_patches, top

SETTINGS = (
    ("all", PATCHES, False),
    ("cls", 20, True),
    ("cls", 20, False),
    ("random", 20, True),
)
_EVEN = np.full(len(KINDS), 1 / len(KINDS))


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
    wanted = packed.target != -100
    answer = packed.answer[wanted]
    right = (logits.argmax(-1) == target)[answer].cpu().numpy()
    kinds = packed.kind[wanted][answer].cpu().numpy()
    return np.bincount(kinds, right, minlength=8), np.bincount(kinds, minlength=8)


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration,
    encode: Encoder,
    scenes: int = 64,
    split: Split = Split.VALIDATION,
) -> dict[str, dict[str, float]]:
    """Accuracy per kind and its unweighted mean, for each setting.

    Args:
        model: the reference model.
        encode: the tokenizer's memory.
        scenes: how many; each is asked twelve questions.
        split: where they come from.
    """
    counts = {s: [np.zeros(8), np.zeros(8)] for s in SETTINGS}
    device = model.device
    for first in range(0, scenes, 16):
        batch = make_batch(split, range(first, min(scenes, first + 16)), 12, _EVEN, encode)
        states = run_tower(model.model.vision_tower, batch.pixels().to(device), None)
        tokens = model.model.multi_modal_projector(states.hidden[-2][:, 1:])
        for setting, sums in counts.items():
            for total, part in zip(
                sums, _answers(model, states, tokens, batch, setting), strict=True
            ):
                total += part
    table = {}
    for (how, keep, contiguous), (right, asked) in counts.items():
        rate = right / np.maximum(asked, 1)
        row = {kind: round(float(r), 4) for kind, r in zip(KINDS, rate, strict=True)}
        name = f"{how}@{keep}" + ("" if how == "all" or contiguous else "-original")
        table[name] = {"mean": round(float(rate.mean()), 4), **row}
    return table
