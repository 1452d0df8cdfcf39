"""Early exit by similarity: blocks of a tower that change nothing any more are not run.

https://arxiv.org/abs/2308.00255
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmcompress.methods.ops.similarity import LeavesAlike, first_exit
from vlmcompress.methods.tower.exiting import TowerExit


@dataclass(frozen=True)
class EarlyExitTower(LeavesAlike, TowerExit):
    """Leave behind the first block that turns the patches by less than an angle on average.

    Compared is each patch as it came into the block and as it came out of it; the mean cosine over
    patches must reach the threshold, in every image of a call. Exits are those of similarity, as
    in MuE (https://arxiv.org/abs/2211.11152); LGViT adds trained heads, which a tower that feeds a
    language model has no use for. `vlmcompress calibrate early_exit --where tower` finds the
    threshold.

    Attributes:
        threshold: mean cosine similarity; above 1 nothing leaves early.
        first: the earliest block behind which patches may leave.
    """

    name: ClassVar[str] = "early_exit_tower"
    paper: ClassVar[str] = "https://arxiv.org/abs/2308.00255"

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """All patches in every layer; `first` must be one."""
        first_exit(self.first, depth)
        return super().schedule(n, keep, depth, last)
