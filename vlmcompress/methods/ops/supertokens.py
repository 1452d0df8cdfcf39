"""Super tokens: soft clusters of neighbouring places (STA, arXiv 2211.11167, §3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, fold, pad, unfold

_NEIGHBOURS = 3


@dataclass(frozen=True)
class SuperTokens:
    """Clusters of a map cut into cells, each drawn to the nine cells around it.

    Attributes:
        tokens: [b, c, rows, columns], one per cell.
        affinity: [b, cells, places of a cell, 9] softmax of each place over the cells around
            its own, in raster order; beyond the border it is lost.
        cell: (height, width) of a cell.
    """

    tokens: Tensor
    affinity: Tensor
    cell: tuple[int, int]

    def spread(self, size: tuple[int, int]) -> Tensor:
        """The tokens given back to the places of a map of `size`: [b, c, height, width]."""
        around = _around(self.tokens)
        values = torch.einsum("bnpk,bnck->bncp", self.affinity, around)
        return _as_map(values, self.tokens.shape[2:], self.cell)[..., : size[0], : size[1]]

    def by_place(self) -> Tensor:
        """Affinities as a map, [b, 9, height, width] with the padding of the last cells."""
        return _as_map(self.affinity.transpose(2, 3), self.tokens.shape[2:], self.cell)


def cluster(x: Tensor, cell: tuple[int, int], iterations: int = 1) -> SuperTokens:
    """Soft clusters of a map; places are added on the right and below where cells do not fit.

    Args:
        x: [b, c, height, width].
        cell: (height, width) of a cell.
        iterations: how often places choose and clusters follow, at least 1.
    """
    h, w = x.shape[2:]
    x = pad(x, (0, -w % cell[1], 0, -h % cell[0]))
    places = _as_cells(x, cell)
    tokens = avg_pool2d(x, cell)
    affinity = places.new_zeros(())
    for _ in range(iterations):
        logits = places @ _around(tokens) * x.shape[1] ** -0.5
        affinity = logits.softmax(-1)
        tokens = _gathered(places, affinity, tokens.shape[2:])
    return SuperTokens(tokens, affinity, cell)


def _gathered(places: Tensor, affinity: Tensor, grid: Sequence[int]) -> Tensor:
    """Means of the places, weighted by affinity: [b, c, rows, columns]."""
    sums = places.transpose(2, 3) @ affinity
    total = _back(affinity.sum(2, keepdim=True).transpose(1, 2), grid)
    return _back(sums.transpose(1, 2), grid) / (total + 1e-12)


def _as_cells(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """[b, cells, places of a cell, c]."""
    h, w = cell
    b, c, height, width = x.shape
    x = x.reshape(b, c, height // h, h, width // w, w)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def _as_map(values: Tensor, grid: Sequence[int], cell: tuple[int, int]) -> Tensor:
    """[b, cells, c, places of a cell] as [b, c, height, width]."""
    values = values.reshape(len(values), *grid, values.shape[2], *cell)
    return values.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _around(tokens: Tensor) -> Tensor:
    """The nine tokens around each cell, zeros beyond the border: [b, cells, c, 9]."""
    columns = unfold(tokens, _NEIGHBOURS, padding=_NEIGHBOURS // 2)
    b, _, cells = columns.shape
    return columns.reshape(b, tokens.shape[1], -1, cells).permute(0, 3, 1, 2)


def _back(columns: Tensor, grid: Sequence[int]) -> Tensor:
    """Sums of what each cell gave to its neighbours ([b, c, cells, 9]): [b, c, rows, columns]."""
    flat = columns.transpose(2, 3).flatten(1, 2)
    return fold(flat, tuple(grid), _NEIGHBOURS, padding=_NEIGHBOURS // 2)
