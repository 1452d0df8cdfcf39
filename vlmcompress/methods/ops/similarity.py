"""How alike the states of consecutive layers are, and from which layer on that counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmcompress.methods.options import Layer, check_number, resolve_layer


def agreement(before: Tensor, after: Tensor) -> Tensor:
    """Cosine similarity of states, in float32.

    Args:
        before: [B, d] states, or [B, n, d] of several rows, over which the mean is taken.
        after: the same.

    Returns:
        [B] in [-1, 1].
    """
    similar = cosine_similarity(before.detach().float(), after.detach().float(), dim=-1)
    return similar if similar.ndim == 1 else similar.flatten(1).mean(1)


@dataclass(frozen=True)
class LeavesAlike:
    """What early exits by similarity have in common, in the tower and in the LLM.

    Attributes:
        threshold: cosine similarity; above 1 nothing leaves early, and nothing is computed for it.
        first: the earliest layer behind which rows may leave.
    """

    name: ClassVar[str]
    threshold: float = 0.99
    first: Layer = 0

    def __post_init__(self) -> None:
        """Check the options."""
        check_number(self.name, "threshold", self.threshold, -1, 2)
        first_exit(self.first, None)

    @property
    def never(self) -> bool:
        """Above 1."""
        return self.threshold > 1

    def leaves(self, layer: int, depth: int, before: Tensor, after: Tensor) -> Tensor:
        """[B] bool, where rows are as before."""
        if layer < first_exit(self.first, depth):
            return torch.zeros(len(before), dtype=torch.bool, device=before.device)
        return agreement(before, after) >= self.threshold


def first_exit(first: Layer, depth: int | None) -> int:
    """Absolute index of the earliest layer behind which rows may leave.

    Args:
        first: as an option.
        depth: layers; None checks only what can be known without it.

    Raises:
        ConfigTypeError, ConfigError: for a layer that does not exist.
    """
    if depth is None:
        depth = abs(first) + 1 if isinstance(first, int) else 1
    return resolve_layer(first, depth)
