"""EViT: inattentive tokens are dropped, or fused into one, inside the tower (arXiv 2202.07800)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import moved_to
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.ops.topk import descending
from vlmcompress.methods.options import Layer, check_layers, check_number
from vlmcompress.methods.tower.base import TowerReducer, TowerState, layers_within


@dataclass(frozen=True)
class EViT(TowerReducer):
    """In some blocks the patches that [CLS] attends to least leave, between attention and MLP.

    Attentiveness is the block's own [CLS] row, averaged over heads (§3.1). The dropped patches'
    sum, weighted by it and not normalised (Eq. 4 and the released code), goes on as one more token,
    which counts as an ordinary patch from then on. Kept patches are ordered from most to least
    attentive, the fused one last, as in the released code; what leaves the tower is in raster
    order, the fused token at the place of the most attentive patch in it.

    The same share stays in each of the layers, such that `keep` is met exactly, the fused token
    included; `rate` gives the share itself instead, rounded up, as published.

    Attributes:
        layers: blocks that reduce; the paper's 4th, 7th and 10th of twelve.
        rate: share kept in each of them, in place of `keep`.
        fuse: whether the others are fused instead of dropped.
    """

    name: ClassVar[str] = "evit"
    paper: ClassVar[str] = "https://arxiv.org/abs/2202.07800"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    looks_at: ClassVar[tuple[str, ...]] = ("[CLS] attention",)
    needs_cls: ClassVar[bool] = True
    layers: tuple[Layer, ...] = (0.25, 0.5, 0.75)
    rate: float | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, self.layers)
        if self.rate is not None:
            check_number(self.name, "rate", self.rate, 0, 1)
            if self.rate == 0:
                raise ConfigError(f"{self.name}'s rate is 0; it must be in (0, 1].")

    @property
    def own_budget(self) -> bool:
        """With a rate."""
        return self.rate is not None

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """Geometric over the layers; by `rate`, the published counts."""
        layers = layers_within(self.name, self.layers, depth, last)
        if self.rate is None:
            k = self.final(n, keep)
            left = [max(k, m) for m in schedules.geometric(n, k, len(layers))]
        else:
            rate = self.rate
            left = schedules.repeated(n, len(layers), lambda now: self._published(now, rate))
        return schedules.at_layers(n, layers, left, last + 1)

    def _published(self, n: int, rate: float) -> int:
        kept = math.ceil(rate * n)
        return n if kept == n else kept + self.fuse

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Keep the most attentive patches."""
        ranking, scores = attentive(state)
        # A fused token stands for two patches at least, or it would be one of them as it is.
        kept = k - 1 if self.fuse and k > 1 else k
        order, rest = ranking[:, :kept], ranking[:, kept:]
        cls = torch.arange(state.cls_rows, device=order.device).expand(len(order), -1)
        rows = torch.cat([cls, order + state.cls_rows], 1)
        if kept == k:
            return state.select(rows)
        weights = scores.gather(1, rest)
        dropped = torch.take_along_dim(state.hidden, rest[..., None] + state.cls_rows, 1)
        fused = (weights[..., None] * dropped.float()).sum(1, keepdim=True)
        hidden = torch.take_along_dim(state.hidden, rows[..., None], 1)
        hidden = torch.cat([hidden, fused.to(hidden.dtype)], 1)
        moved = moved_to(rows, state.mass.shape[1], others=rows.shape[1])
        most = rest[:, :1] + state.cls_rows
        return state.regroup(hidden, torch.cat([rows, most], 1), moved)


def attentive(state: TowerState) -> tuple[Tensor, Tensor]:
    """Patches from most to least attentive, and how much [CLS] attends to each: [b, n] both."""
    scores = state.attended().weights(slice(0, 1))[:, :, 0, state.cls_rows :].mean(1)
    return descending(scores), scores
