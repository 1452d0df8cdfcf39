"""HVT: the sequence is pooled at the head of each stage of the tower (arXiv 2103.10619)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import (
    adaptive_avg_pool1d,
    adaptive_max_pool1d,
    avg_pool1d,
    max_pool1d,
)

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.options import Layer, check_count, check_layers
from vlmcompress.methods.tower.base import Place, TowerReducer, TowerState, layers_within

Pooling: TypeAlias = Literal["max", "average"]

_STRIDE = 2


@dataclass(frozen=True)
class HVT(TowerReducer):
    """Hierarchical pooling: after some blocks, windows of the sequence become one token each.

    The tower is cut into stages of equal length; after the first block of each, the sequence of
    patches, in raster order, is pooled in one dimension, channel by channel. The paper trains
    towers so, with a position embedding added after every pooling and without [CLS]; here nothing
    is added, [CLS] stays and is not pooled, and how well a tower bears that is not the paper's
    claim.

    `stages` pools as published, which was checked against the released code: windows of `kernel`
    patches with a stride of 2, and what a last incomplete one would hold is dropped. With `keep`
    the count is exact instead: as many stages as it takes halvings, or the blocks named, the same
    share staying in each, and windows that cover everything evenly (adaptive pooling). Where an
    odd number is halved, these are the windows of three with a stride of 2.

    A token is named by the patch in the middle of its window; another patch belongs to the last
    window that it lies in.

    Attributes:
        layers: blocks after which the sequence is pooled, with `keep`; the first of each stage
            when not given.
        stages: how many stages, in place of `keep`.
        kernel: patches in a window, with `stages`.
        pooling: `max` or `average`.
    """

    name: ClassVar[str] = "hvt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2103.10619"
    layers: tuple[Layer, ...] | None = None
    stages: int | None = None
    kernel: int = 3
    pooling: Pooling = "max"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.layers is not None:
            check_layers(self.name, self.layers)
        if self.stages is not None:
            check_count(self.name, "stages", self.stages)
        check_count(self.name, "kernel", self.kernel, _STRIDE)
        if self.pooling not in get_args(Pooling):
            raise ConfigError(
                f"{self.name}'s pooling is {self.pooling!r}; it must be one of "
                f"{', '.join(get_args(Pooling))}."
            )
        if self.stages is not None and self.layers is not None:
            raise ConfigError(
                f"{self.name}: stages has places of its own; leave one of stages and layers out."
            )

    @property
    def place(self) -> Place:
        """After the block."""
        return "after"

    @property
    def own_budget(self) -> bool:
        """With `stages`."""
        return self.stages is not None

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """The same share in every stage; with `stages`, the published counts."""
        if self.stages is not None:
            layers = _heads(self.stages, depth, last)
            left = schedules.repeated(n, len(layers), self._published)
            return schedules.at_layers(n, layers, left, last + 1)
        k = self.final(n, keep)
        if self.layers is None:
            layers = _heads(max(1, math.ceil(math.log2(n / k))), depth, last)
        else:
            layers = layers_within(self.name, self.layers, depth, last)
        left = [max(k, m) for m in schedules.geometric(n, k, len(layers))]
        return schedules.at_layers(n, layers, left, last + 1)

    def _published(self, n: int) -> int:
        return n if n < self.kernel else (n - self.kernel) // _STRIDE + 1

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Pool the sequence to `k` tokens."""
        first, n = state.cls_rows, state.patches
        windows = _even(n, k) if self.stages is None else _strided(k, self.kernel)
        named, owner = _owners(windows, n, state.source.device)
        pooled = self._pooled(state.hidden[:, first:].float().transpose(1, 2), k)
        pooled = pooled.transpose(1, 2).to(state.hidden.dtype)
        hidden = torch.cat([state.hidden[:, :first], pooled], 1)
        cls = torch.arange(first, device=owner.device)
        moved = torch.where(owner < 0, -1, owner + first)
        rows, moved = torch.cat([cls, named + first]), torch.cat([cls, moved])
        b = len(hidden)
        return state.regroup(hidden, rows.expand(b, -1), moved.expand(b, -1))

    def _pooled(self, x: Tensor, k: int) -> Tensor:
        """[b, c, k] of [b, c, n]."""
        if self.stages is None:
            pooled = adaptive_max_pool1d if self.pooling == "max" else adaptive_avg_pool1d
            return pooled(x, k)
        strided = max_pool1d if self.pooling == "max" else avg_pool1d
        return strided(x, self.kernel, _STRIDE)


def _heads(stages: int, depth: int, last: int) -> tuple[int, ...]:
    """The first block of each of some equal stages, up to `last`."""
    return tuple(sorted({min(i * depth // stages, last) for i in range(stages)}))


def _even(n: int, k: int) -> list[range]:
    """Windows of adaptive pooling, which cover n places evenly."""
    return [range(i * n // k, -(-(i + 1) * n // k)) for i in range(k)]


def _strided(k: int, kernel: int) -> list[range]:
    return [range(_STRIDE * i, _STRIDE * i + kernel) for i in range(k)]


def _owners(windows: list[range], n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The place in the middle of each window, [k], and the window of each place, [n]; -1 for none.

    A place belongs to the last window that it lies in, but the middle of a window to that.
    """
    owner = [-1] * n
    for i, window in enumerate(windows):
        for place in window:
            owner[place] = i
    named = [(window.start + window.stop - 1) // 2 for window in windows]
    for i, place in enumerate(named):
        owner[place] = i
    return torch.tensor(named, device=device), torch.tensor(owner, device=device)
