"""One pass of a tower whose queries look at some of the keys: its blocks' attention is made here.

A kernel takes queries and keys whole, so that one which skips connections must stand in its place.
The projections before and after it are the block's own, and run as modules, so that whatever is
hooked to them (evidence, adapters) still is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.families.towers import Tower
from vlmcompress.live.exitrun import ExitRun
from vlmcompress.live.towerrun import TowerRun
from vlmcompress.methods.pipeline import TowerStage
from vlmcompress.methods.tower.base import TowerAttention
from vlmcompress.methods.tower.exiting import TowerExit
from vlmcompress.methods.tower.sparsity import AttentionSparsifier


class SparseRun(TowerRun):
    """The state of one pass; all rows leave it."""

    _keys: tuple[int, ...] = ()

    @property
    def keys(self) -> tuple[int, ...]:
        """Keys that a query looks at in each layer."""
        return self._keys

    @property
    def sparsifies(self) -> bool:
        """Whether the block that runs is to look at fewer keys than it has."""
        return self._layer < len(self._keys) and self._keys[self._layer] < self.n_full

    def _begin(self, hidden: Tensor) -> None:
        super()._begin(hidden)
        assert isinstance(self._method, AttentionSparsifier)  # `run_of` has seen to it
        n = self.state.patches
        if self._keep is None or self._method.keys_kept(n, self._keep) < n:
            self._keys = self._method.connections(n, self._keep, self._depth, self._last)

    def attention(self, module: nn.Module, given: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """What the attention of the block that runs answers to [b, n, d].

        Raises:
            UnsupportedInputError: when it is called with a mask.
        """
        assert isinstance(self._method, AttentionSparsifier)  # `run_of` has seen to it
        if kwargs.get("attention_mask") is not None:
            raise UnsupportedInputError(
                f"{self._method.name} chooses the keys of each query, and this vision tower masks "
                "some itself; give images that fill the tower's grid, or use another method."
            )
        tower = self._tower
        outputs = {
            name: module.get_submodule(name)(given) for name in (*tower.projections, tower.values)
        }
        qk = tower.queries_keys(module, outputs, kwargs)
        values = tower.heads(outputs[tower.values], module)
        attention = TowerAttention(qk.q, qk.k, qk.scale, values)
        k = self._keys[self._layer]
        mixed = self._method.attend(self._layer, attention, k, self._cls_rows, self._parts)
        return module.get_submodule(tower.output)(mixed.transpose(1, 2).flatten(2)), None


def makes_attention(tower: Tower, attention: nn.Module) -> bool:
    """Whether a tower's attention is projections that can be called one by one."""
    names = (*tower.projections, tower.values, tower.output)
    return tower.registers == 0 and all(
        isinstance(getattr(attention, name, None), nn.Module) for name in names
    )


def run_of(stage: TowerStage, tower: Tower, depth: int, last: int, **more: Any) -> TowerRun:
    """The pass of a stage; `more` as for `TowerRun`."""
    kinds = ((AttentionSparsifier, SparseRun), (TowerExit, ExitRun))
    kind = next((run for method, run in kinds if isinstance(stage.method, method)), TowerRun)
    return kind(stage, tower, depth, last, **more)
