"""Square maps of patches cut into cells of equal size, those at the border smaller."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

Size = tuple[int, int]


@cache
def fitting(side: int, k: int) -> Size:
    """Size (height, width) of the cells: as many as possible but `k`, then as square as possible.

    Args:
        side: of the map.
        k: cells at most, at least 1.
    """
    sizes = [(h, w) for h in range(1, side + 1) for w in range(1, side + 1)]
    counts = {size: math.prod(grid(side, size)) for size in sizes}
    small = [size for size in sizes if counts[size] <= k]
    return min(small, key=lambda size: (-counts[size], abs(size[0] - size[1])))


def grid(side: int, cell: Size) -> Size:
    """(rows, columns) of cells that cover the map."""
    return -(-side // cell[0]), -(-side // cell[1])


def centres(side: int, cell: Size, device: torch.device | str = "cpu") -> Tensor:
    """[k] the patch at the centre of each cell, ascending."""
    rows, columns = (
        _middles(side, length, count, device)
        for length, count in zip(cell, grid(side, cell), strict=True)
    )
    return (rows[:, None] * side + columns).flatten()


def owners(side: int, cell: Size, device: torch.device | str = "cpu") -> Tensor:
    """[side * side] the cell that each patch lies in."""
    place = torch.arange(side, device=device)
    row, column = place // cell[0], place // cell[1]
    return (row[:, None] * grid(side, cell)[1] + column).flatten()


def _middles(side: int, length: int, count: int, device: torch.device | str) -> Tensor:
    start = torch.arange(count, device=device) * length
    return (start + (start + length).clamp(max=side) - 1) // 2
