"""One pass of a tower that may end before its last block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vlmcompress.live.exiting import refuse_training
from vlmcompress.live.towerrun import TowerRun
from vlmcompress.methods.tower.exiting import TowerExit


class ExitRun(TowerRun):
    """The state of one pass; all rows leave it."""

    _ran = 0
    _left = False

    @property
    def ran(self) -> int:
        """Blocks that were run."""
        return self._ran

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """Rows in each layer, none in those that were not run."""
        return (*super().rows[: self._ran], *[(0, 0)] * (self._last + 1 - self._ran))

    def block(
        self, layer: int, module: nn.Module, forward: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> Tensor:
        """The output of a block, or what left before it."""
        if self._left:
            return hidden
        method = self._method
        assert isinstance(method, TowerExit)  # `run_of` has seen to it
        refuse_training(method.name, module.training)
        output = super().block(layer, module, forward, hidden)
        self._ran = layer + 1
        if layer < self._last and not method.never:
            pair = (self._patches(x) for x in (hidden, output))
            self._left = bool(method.leaves(layer, self._depth, *pair).all())
        return output

    def _patches(self, hidden: Tensor) -> Tensor:
        """[b, n, d] rows that are patches."""
        return self._shown(self._tower.rows(hidden), 1)[:, self._cls_rows :]
