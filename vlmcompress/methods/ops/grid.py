"""Integer arithmetic on token grids: even shares, even places, near-square grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from vlmcompress.core.errors import ConfigError

Grid = tuple[int, int, int]


def split(k: int, lengths: Sequence[int]) -> list[int]:
    """`k` shared in proportion to `lengths`, evenly from first to last.

    Running totals are rounded (half up), so every prefix has its fair part and the sum is exactly
    `k`; a share never exceeds its length while `k <= sum(lengths)`.
    """
    total = sum(lengths)
    ends = [(2 * k * end + total) // (2 * total) for end in accumulate(lengths)]
    return [b - a for a, b in pairwise([0, *ends])]


def centres(length: int, k: int) -> list[int]:
    """The middles of `k` equal intervals of `range(length)`; unique, ascending for k <= length."""
    return [(2 * i + 1) * length // (2 * k) for i in range(k)]


def edges(length: int, cells: int) -> list[tuple[int, int]]:
    """`range(length)` cut into `cells <= length` half-open, nearly equal intervals."""
    return list(pairwise(i * length // cells for i in range(cells + 1)))


def side_of(method: str, n: int) -> int:
    """The side of a square map of `n` patches.

    Args:
        method: name for messages.
        n: patches.

    Raises:
        ConfigError: when they form no square.
    """
    side = math.isqrt(n)
    if side * side != n:
        raise ConfigError(f"{method} needs a square map of patches, and there are {n}.")
    return side


def spread(grid: Grid, k: int) -> list[int]:
    """`k` places spread over a (t, h, w) grid.

    `min(t, k)` evenly spaced frames share `k`. Inside a frame, the number of rows makes the
    vertical spacing as near to the horizontal one as integers allow; rows share the frame's count
    evenly, and each row spreads its own over the columns. `k = t * h * w` gives every place.

    Returns:
        `k` unique ascending raster offsets, 1 <= k <= t * h * w.
    """
    t, h, w = grid
    frames = min(t, k)
    places = []
    for frame, share in zip(centres(t, frames), split(k, [1] * frames), strict=True):
        rows = min(h, share, max(math.ceil(share / w), round(math.sqrt(share * h / w))))
        for row, count in zip(centres(h, rows), split(share, [1] * rows), strict=True):
            places += [(frame * h + row) * w + column for column in centres(w, count)]
    return places


def nearest_grid(grid: Grid, k: int) -> Grid:
    """The pooled grid of at most `k` cells whose shape is closest to that of a (t, h, w) grid.

    `t' = min(t, k)` frames share the budget. For each number of rows, as many columns as the
    budget allows are tried; the aspect ratio closest to h / w (as a factor) wins, then more cells,
    then more columns. `k = t * h * w` gives the grid itself, `k = 0` no cell.
    """
    t, h, w = grid
    if k == 0:
        return (0, 0, 0)
    frames = min(t, k)
    area = k // frames
    rows, columns = min(
        ((r, min(w, area // r)) for r in range(1, min(h, area) + 1)),
        key=lambda cells: (_distortion(cells[0] * w, cells[1] * h), -math.prod(cells), -cells[1]),
    )
    return (frames, rows, columns)


def squarest(side: int, k: int) -> tuple[int, int]:
    """(rows, columns) of the squarest grid of exactly `k` cells, at most `side` either way.

    Raises:
        ConfigError: when no grid has that many.
    """
    fitting = [(r, k // r) for r in range(1, side + 1) if k % r == 0 and k // r <= side]
    if not fitting:
        raise ConfigError(f"No grid of at most {side} x {side} cells has {k} of them.")
    return min(fitting, key=lambda cells: (_distortion(*cells), cells[0]))


def _distortion(a: int, b: int) -> float:
    return max(a, b) / min(a, b)
