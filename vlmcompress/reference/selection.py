"""Which patches a training step keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError

from .scenes import PATCHES


def objects_and_ground(share: Tensor, total: int, draw: torch.Generator) -> Tensor:
    """All object patches and random ground, for cheap steps.

    Args:
        share: ``[b, 196]`` covered share of each patch.
        total: patches to keep.
        draw: source of randomness (CPU).

    Returns:
        ``[b, total]`` indices, increasing.
    """
    noise = torch.rand(share.shape, generator=draw).to(share.device)
    return top(noise + 2 * (share > 0), total)


def top(score: Tensor, k: int) -> Tensor:
    """Indices of the k best, in reading order, ``[b, k]``."""
    return score.topk(k, dim=1).indices.sort(dim=1).values


def score_patches(how: str, attention: Tensor, share: Tensor, draw: torch.Generator) -> Tensor:
    """Score patches ``[b, m]`` by one of the three ways that training mixes.

    Args:
        how: ``"cls"``, ``"random"`` or ``"coverage"``.
        attention: ``[b, m]`` [CLS] attention.
        share: ``[b, m]`` covered share.
        draw: source of randomness (CPU).

    Raises:
        ConfigError: for another name.
    """
    if how == "cls":
        return attention
    noise = torch.rand(share.shape, generator=draw).to(share.device)
    if how == "random":
        return noise
    if how == "coverage":
        return share + 0.3 * noise
    raise ConfigError(f"how={how!r}: allowed are 'cls', 'random', 'coverage'")


def draw_budget(draw: torch.Generator, available: int = PATCHES) -> int:
    """Draw how many tokens a compressed step keeps: 20 (a tenth) is the most frequent."""
    budgets = (98, 49, 49, 32, 20, 20, 20, 20, 20, 10)
    pick = int(torch.randint(len(budgets), (1,), generator=draw))
    return min(available, budgets[pick])
