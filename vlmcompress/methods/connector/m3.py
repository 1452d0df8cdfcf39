"""M3: nested average pooling, for models tuned at all of its scales (arXiv 2405.17430)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from vlmcompress.methods.connector.pool import Pool
from vlmcompress.methods.ops.grid import Grid
from vlmcompress.methods.ops.windows import Size


@dataclass(frozen=True)
class M3(Pool):
    """Average pooling of the LLM's visual tokens to one of a few nested scales.

    From the whole map on, every scale joins cells of the one before, p x p of them with the
    smallest p that divides both sides: 24 x 24 tokens have the published scales of 24, 12, 6, 3 and
    1 cells a side, 576, 144, 36, 9 and 1 tokens. A scale's tokens are means of those of any finer
    one. Sides without a common divisor are joined to one cell.

    There are no weights; what is trained is the model, on the mean of its losses at all `scales`.
    That is the difference to `pool`, which is for models as they are: `pool` cuts the grid that is
    nearest to the budget, of any shape and with uneven cells, and `m3` takes the finest scale that
    the budget pays for, so that a tuned model sees no other cells than it was tuned on (k = 58:
    7 x 8 cells by `pool`, 6 x 6 by `m3`). All else is as for `pool`.
    """

    name: ClassVar[str] = "m3"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.17430"

    def cells(self, grid: Grid, k: int) -> Grid:
        """(t, h, w) of the finest scale of at most k cells; all frames have the same one."""
        if k == 0:
            return (0, 0, 0)
        frames = min(grid[0], k)
        fitting = (size for size in self.scales(grid[1:]) if math.prod(size) <= k // frames)
        return (frames, *next(fitting))

    @staticmethod
    def scales(size: Size) -> list[Size]:
        """(height, width) of all scales of a map, the finest first.

        Args:
            size: of the map, in tokens.
        """
        scales = [size]
        while scales[-1] != (1, 1):
            h, w = scales[-1]
            p = next((p for p in range(2, min(h, w) + 1) if h % p == 0 == w % p), None)
            scales.append((1, 1) if p is None else (h // p, w // p))
        return scales
