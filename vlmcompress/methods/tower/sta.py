"""STA: patches gather in super tokens, once inside the tower (arXiv 2211.11167)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.ops import cells, schedules, supertokens
from vlmcompress.methods.options import Layer, check_count, check_layers
from vlmcompress.methods.tower.base import Place, TowerReducer, TowerState, layers_within


@dataclass(frozen=True)
class STA(TowerReducer):
    """Super token sampling after one block: the rest of the tower sees soft clusters of patches.

    The map of patches is cut into cells. Every patch is drawn to the nine cells around it by the
    softmax of its products with their means, and each super token is the mean of the patches drawn
    to it, weighted by that (§3.2). The paper attends among super tokens and gives them back to the
    patches inside every block of a network trained so; here they go on in the patches' place, which
    needs no training. Neighbours beyond the border take part with a product of 0 and what is drawn
    to them is lost, as in the released code.

    The count is its own: the most cells of equal size, those at the border smaller, that are no
    more than asked for, and of these the squarest (24 x 24 patches, keep=0.1: k = 58, cells of
    3 x 4 patches, 48 tokens). A super token is named by the patch at its cell's centre, and every
    other patch belongs to the one it is drawn to most.

    Attributes:
        layer: the block after which patches gather.
        iterations: how often patches choose and super tokens follow.
    """

    name: ClassVar[str] = "sta"
    paper: ClassVar[str] = "https://arxiv.org/abs/2211.11167"
    layer: Layer = 0.5
    iterations: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, (self.layer,))
        check_count(self.name, "iterations", self.iterations)

    @property
    def place(self) -> Place:
        """After the block."""
        return "after"

    def tokens_kept(self, n: int, keep: float | int) -> int:
        """Cells, at most the count asked for.

        Raises:
            ConfigError: for patches that form no square.
        """
        side, k = _side(n), keeping.count(keep, n)
        return n if k == n else math.prod(cells.grid(side, cells.fitting(side, k)))

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """All at once."""
        layers = layers_within(self.name, (self.layer,), depth, last)
        return schedules.at_layers(n, layers, [self.final(n, keep)], last + 1)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Gather the patches in `k` super tokens."""
        first, side = state.cls_rows, _side(state.patches)
        cell = cells.fitting(side, k)
        grid = cells.grid(side, cell)
        x = state.hidden[:, first:].float().transpose(1, 2)
        x = x.reshape(*x.shape[:2], side, side)
        found = supertokens.cluster(x, cell, self.iterations)
        centres, owner = _named(found, side, cell, grid)
        hidden = found.tokens.flatten(2).transpose(1, 2).to(state.hidden.dtype)
        cls = torch.arange(first, device=owner.device).expand(len(owner), -1)
        rows = torch.cat([cls, (centres + first).expand(len(owner), -1)], 1)
        hidden = torch.cat([state.hidden[:, :first], hidden], 1)
        return state.regroup(hidden, rows, torch.cat([cls, owner + first], 1))


def _side(n: int) -> int:
    side = math.isqrt(n)
    if side * side != n:
        raise ConfigError(f"sta needs a square map of patches, and there are {n}.")
    return side


def _named(
    found: supertokens.SuperTokens, side: int, cell: tuple[int, int], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The patch at the centre of each cell, [k], and the super token of each patch, [b, n]."""
    device = found.affinity.device
    place = torch.arange(side, device=device)
    row, column = place // cell[0], place // cell[1]
    step = torch.arange(9, device=device)
    down, across = step // 3 - 1 + row[:, None], step % 3 - 1 + column[:, None]
    inside = ((down >= 0) & (down < grid[0]))[:, None] & ((across >= 0) & (across < grid[1]))
    drawn = found.by_place()[:, :, :side, :side].permute(0, 2, 3, 1)
    choice = drawn.masked_fill(~inside, -1).argmax(3)
    number = down[:, None] * grid[1] + across
    owner = torch.take_along_dim(number.expand_as(drawn), choice[..., None], 3).flatten(1)
    centres = cells.centres(side, cell, device)
    own = torch.arange(len(centres), device=device).expand(len(owner), -1)
    return centres, owner.scatter(1, centres.expand(len(owner), -1), own)
