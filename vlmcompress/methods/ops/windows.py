"""Maps of tokens cut into cells that are as even as whole tokens allow."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from vlmcompress.methods.ops.grid import edges

Size: TypeAlias = tuple[int, int]  #: (height, width)


def windows(size: Size, cells: Size) -> tuple[Tensor, Tensor]:
    """The tokens of each cell, so that all cells can be gathered at once.

    Args:
        size: of the map in tokens.
        cells: (rows, columns) of the cells, at most `size`.

    Returns:
        [k, m] tokens of each cell in raster order, cells in raster order, and [k, m] bool, which of
        them the cell has; a cell smaller than the largest is filled up with its first token.
    """
    (y, in_y), (x, in_x) = (_cut(length, k) for length, k in zip(size, cells, strict=True))
    k = cells[0] * cells[1]
    rows = (y[:, None, :, None] * size[1] + x[None, :, None, :]).reshape(k, -1)
    filled = (in_y[:, None, :, None] & in_x[None, :, None, :]).reshape(k, -1)
    return torch.where(filled, rows, rows[:, :1]), filled


def owners(size: Size, cells: Size) -> Tensor:
    """[h * w] the cell of each token."""
    rows, filled = windows(size, cells)
    owner = torch.empty(size[0] * size[1], dtype=torch.long)
    owner[rows[filled]] = torch.arange(len(rows))[:, None].expand_as(rows)[filled]
    return owner


def middles(size: Size, cells: Size) -> Tensor:
    """[k] the token in the middle of each cell, the upper left of an even middle."""
    y, x = (
        torch.tensor([(a + b - 1) // 2 for a, b in edges(length, k)])
        for length, k in zip(size, cells, strict=True)
    )
    return (y[:, None] * size[1] + x).flatten()


def as_map(rows: Tensor, size: Size) -> Tensor:
    """[b, h * w, d] rows in raster order as a map, [b, d, h, w]."""
    return rows.transpose(1, 2).reshape(len(rows), -1, *size)


def as_rows(maps: Tensor) -> Tensor:
    """[b, d, h, w] maps as rows in raster order, [b, h * w, d]."""
    return maps.flatten(2).transpose(1, 2)


def _cut(length: int, k: int) -> tuple[Tensor, Tensor]:
    """One side in nearly equal intervals: the places in each, [k, longest], and which it has."""
    start, stop = torch.tensor(edges(length, k)).T
    places = start[:, None] + torch.arange(int((stop - start).max()))
    return places, places < stop[:, None]
