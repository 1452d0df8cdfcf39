"""Pool: average neighbouring tokens into a coarser grid, a baseline without a paper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import Segment, VisualTokens
from vlmcompress.methods.base import FeatureSpace, TokenCompressor
from vlmcompress.methods.ops.grid import Grid, edges, nearest_grid, split


@dataclass(frozen=True)
class Pool(TokenCompressor):
    """Average pooling of the LLM's visual tokens over non-overlapping cells.

    The count is pool's own: the cells of the grid of at most k cells that is nearest in shape
    (24 x 24 tokens, keep=0.1: k = 58, a 7 x 8 grid, 56 tokens). Segments share k in proportion to
    their tokens and have a grid each; one whose share is 0 is dropped. A cell's `index` is the
    token at its centre (upper left of an even middle), its evidence is that token's, its `mass` the
    tokens averaged.
    """

    name: ClassVar[str] = "pool"
    reads: ClassVar[FeatureSpace] = "llm"

    def tokens_kept(self, segments: Sequence[Segment], keep: float | int) -> int:
        """Cells over all segments, at most the count asked for."""
        return sum(math.prod(cells) for cells in self._grids(segments, keep))

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Replace the tokens of each cell by their mean.

        Raises:
            ConfigError: when an earlier method dropped or merged tokens, so that no grid is left.
        """
        if tokens.n != tokens.n_full:
            raise ConfigError(
                f"{self.name} averages over whole grids, but an earlier method left {tokens.n} of "
                f"{tokens.n_full} tokens; put {self.name} first, or use 'uniform' in its place."
            )
        segments, grids = tokens.segments, self._grids(tokens.segments, keep)
        if sum(map(math.prod, grids)) == tokens.n:
            return tokens
        index, cell = (x.to(tokens.index.device) for x in _layout(segments, grids, tokens.n))
        mass = torch.bincount(cell[cell >= 0]).to(tokens.mass.dtype)
        return dataclasses.replace(
            tokens,
            features=_average(tokens.features, segments, grids),
            index=tokens.index[:, index],
            mass=mass.expand(len(tokens.mass), -1),
            assignment=cell.expand(len(tokens.features), -1),
            evidence=tokens.evidence.select(index.expand(len(tokens.features), -1)),
        )

    def cells(self, grid: Grid, k: int) -> Grid:
        """(t, h, w) of the cells, at most k, of a segment of (t, h, w) tokens; zeros for none."""
        return nearest_grid(grid, k)

    def _grids(self, segments: Sequence[Segment], keep: float | int) -> list[Grid]:
        """The pooled grid of each segment."""
        lengths = [s.length for s in segments]
        shares = split(keeping.count(keep, sum(lengths)), lengths)
        return [self.cells(s.grid, k) for s, k in zip(segments, shares, strict=True)]


def _layout(segments: Sequence[Segment], grids: Sequence[Grid], n: int) -> tuple[Tensor, Tensor]:
    """The token at the centre of each cell, [m], and the cell of each token, [n] (-1 for none)."""
    cell = torch.full((n,), -1)
    centres: list[Tensor] = []
    for segment, grid in zip(segments, grids, strict=True):
        if not math.prod(grid):
            continue
        cuts = [edges(length, k) for length, k in zip(segment.grid, grid, strict=True)]
        owners = [[i for i, (a, b) in enumerate(cut) for _ in range(a, b)] for cut in cuts]
        cell[segment.slice] = sum(map(len, centres)) + _raster(owners, grid)
        middles = [[(a + b - 1) // 2 for a, b in cut] for cut in cuts]
        centres.append(segment.slice.start + _raster(middles, segment.grid))
    return torch.cat(centres), cell


def _raster(places: Sequence[Sequence[int]], grid: Grid) -> Tensor:
    """Raster offsets in `grid` of every combination of places along t, h and w, flat."""
    t, h, w = (torch.tensor(axis) for axis in places)
    return ((t[:, None] * grid[1] + h)[..., None] * grid[2] + w).flatten()


def _average(values: Tensor, segments: Sequence[Segment], grids: Sequence[Grid]) -> Tensor:
    """Cell means of `values` ([b, n, d]): [b, m, d] in its dtype, summed in float32 or better.

    Axis by axis: the mean of a rectangle is the mean of the means of its rows.
    """
    pooled = []
    for segment, grid in zip(segments, grids, strict=True):
        if not math.prod(grid):
            continue
        x = values[:, segment.slice].to(torch.promote_types(values.dtype, torch.float32))
        x = x.reshape(len(values), *segment.grid, -1)
        for axis, (length, k) in enumerate(zip(segment.grid, grid, strict=True), start=1):
            cells = [x.narrow(axis, a, b - a).mean(axis) for a, b in edges(length, k)]
            x = torch.stack(cells, axis)
        pooled.append(x.flatten(1, 3))
    return torch.cat(pooled, 1).to(values.dtype)
