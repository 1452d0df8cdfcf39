"""The contract of methods that leave a tower early: `TowerExit`."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from vlmcompress.methods.tower.base import TowerReducer, TowerState


class TowerExit(TowerReducer):
    """Inside the tower: all patches stay, and behind some block later ones are not run.

    What left stands for the output of every later block. A pass decides once for all its images.
    """

    @property
    def own_budget(self) -> bool:
        """No patch goes."""
        return True

    @property
    def never(self) -> bool:
        """Whether no pass can leave early, so that none need be looked at."""
        return False

    def tokens_kept(self, n: int, keep: float | int) -> int:
        """All patches."""
        return n

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """All patches in every layer."""
        return (n,) * (last + 1)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Nothing goes."""
        return state

    @abstractmethod
    def leaves(self, layer: int, depth: int, before: Tensor, after: Tensor) -> Tensor:
        """[b] bool, which images need no later block; a pass leaves when none of them does.

        Args:
            layer: that has just run.
            depth: blocks of the tower.
            before: [b, n, d] patches as they came into the block.
            after: [b, n, d] as they came out of it.
        """
