"""ATS: patches are sampled by their significance for [CLS] (arXiv 2111.15667)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.methods.ops import schedules
from vlmcompress.methods.ops.topk import descending
from vlmcompress.methods.options import Layer, check_layers
from vlmcompress.methods.tower.base import TowerReducer, TowerState, layers_within


@dataclass(frozen=True)
class ATS(TowerReducer):
    """Adaptive token sampling after the attention of a block: inverse transform sampling.

    A patch's significance is the attention [CLS] pays it times the norm of its value (Eq. 4), its
    attention and value taken over all heads. Evenly spaced levels of the cumulative distribution,
    patches in ascending significance, each choose the patch whose own level is nearest (§3.2). Only
    queries are dropped by a block that samples; its keys are all there, as in the paper, since rows
    are taken off after its attention.

    Levels fall on one patch more than once, and the paper then goes on with fewer tokens than
    asked for, another number in every image. Here the count is exact, so that the images of a batch
    stay equally long: the most significant of the patches that no level chose fill up.

    Attributes:
        layers: blocks that sample; when not given all from a quarter of the tower on.
    """

    name: ClassVar[str] = "ats"
    paper: ClassVar[str] = "https://arxiv.org/abs/2111.15667"
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "values"})
    looks_at: ClassVar[tuple[str, ...]] = ("[CLS] attention", "values")
    needs_cls: ClassVar[bool] = True
    layers: tuple[Layer, ...] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.layers is not None:
            check_layers(self.name, self.layers)

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """Geometric over the layers."""
        layers = layers_within(self.name, self.layers, depth, last)
        if self.layers is None:
            layers = tuple(layer for layer in layers if layer >= depth // 4)
        k = self.final(n, keep)
        left = [max(k, m) for m in schedules.geometric(n, k, len(layers))]
        return schedules.at_layers(n, layers, left, last + 1)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Sample down to `k` patches, in ascending significance."""
        scores = significance(state)
        ascending = scores.argsort(dim=1, stable=True)
        chosen = sampled(scores.gather(1, ascending), k)
        # A chosen place counts more than any that is not; among both the significant come first.
        rank = torch.arange(chosen.shape[1], device=chosen.device) + chosen * chosen.shape[1]
        rows = ascending.gather(1, descending(rank)[:, :k].sort(1).values) + state.cls_rows
        cls = torch.arange(state.cls_rows, device=rows.device).expand(len(rows), -1)
        return state.select(torch.cat([cls, rows], 1))


def significance(state: TowerState) -> Tensor:
    """[b, n] shares of the patches in all significance."""
    attention = state.attended()
    assert attention.v is not None  # `reads` says so
    row = attention.weights(slice(0, 1))[:, :, 0].sum(1)
    norms = attention.v.float().transpose(1, 2).flatten(2).norm(dim=-1)
    scores: Tensor = (row * norms)[:, state.cls_rows :]
    return scores / scores.sum(1, keepdim=True)


def sampled(scores: Tensor, k: int) -> Tensor:
    """Which places `k` levels of the cumulative distribution choose, [b, n] bool.

    Args:
        scores: [b, n] ascending, summing to 1.
        k: levels; the first is that of the least significant patch.
    """
    reached = scores.cumsum(1)
    low, high = reached[:, :1], reached[:, -1:]
    reached = (reached - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
    first = torch.where(reached > 0, reached, torch.inf).amin(1, keepdim=True)
    first = torch.where(first.isfinite(), first, 0)
    steps = torch.arange(k, device=scores.device) / max(1, k - 1)
    levels = first + (1 - first) * steps
    nearest = (levels[..., None] - reached[:, None]).abs().argmin(2)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, nearest, True)
