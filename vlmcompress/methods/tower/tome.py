"""ToMe: a few similar tokens are merged in every block of the tower (arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.ops.merging import Matching, bipartite, join
from vlmcompress.methods.options import Layer, check_count, check_layers, check_number
from vlmcompress.methods.tower.base import TowerReducer, TowerState, layers_within


@dataclass(frozen=True)
class ToMeTower(TowerReducer):
    """Bipartite soft matching between the attention and the MLP of every block.

    Rows at even places are compared with those at odd places by the cosine of the block's keys,
    averaged over heads; the r most similar pairs become means weighted by how many patches each
    stands for, and later blocks add the log of that number to the keys' logits (§3). At most half
    of a block's patches go. [CLS] never merges.

    Inside the tower rows are in the order in which the released code leaves them (even rows that
    stayed, then the odd ones), which decides who is compared with whom in the next block; what
    leaves the tower is in raster order. `tome` is the same rule, applied once to the tower's
    output.

    About the same number goes in every block, such that `keep` is met exactly; `r` gives the
    number itself instead, as published.

    Attributes:
        layers: blocks that merge; all whose output is used when not given.
        r: tokens merged in each block, or one number per block, in place of `keep`.
        inflection: -1 merges twice the mean in the first block and nothing in the last, 1 the
            other way round, 0 the same in all (§4.1).
        proportional: whether keys are weighed by what they stand for; the paper switches it off
            for towers trained with masked autoencoding.
    """

    name: ClassVar[str] = "tome_tower"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.09461"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    looks_at: ClassVar[tuple[str, ...]] = ("keys",)
    layers: tuple[Layer, ...] | None = None
    r: int | tuple[int, ...] | None = None
    inflection: float = 0.0
    proportional: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        if self.layers is not None:
            check_layers(self.name, self.layers)
        check_number(self.name, "inflection", self.inflection, -1, 1)
        for r in self.r if isinstance(self.r, tuple) else () if self.r is None else (self.r,):
            check_count(self.name, "r", r, 0)
        if self.r is not None and self.layers is not None:
            raise ConfigError(f"{self.name}: r counts all blocks; leave one of r and layers out.")

    @property
    def weighs_keys(self) -> bool:
        """Proportional attention."""
        return self.proportional

    @property
    def own_budget(self) -> bool:
        """With `r`."""
        return self.r is not None

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """Linear over the layers, never more than half at once."""
        if self.r is not None:
            return self._published(n, depth, last)
        layers = layers_within(self.name, self.layers, depth, last)
        plan = schedules.linear(n, self.final(n, keep), len(layers), self.inflection)
        return schedules.at_layers(n, layers, schedules.halving(self.name, n, plan), last + 1)

    def _published(self, n: int, depth: int, last: int) -> tuple[int, ...]:
        assert self.r is not None  # its caller asked
        left = []
        for r in schedules.removals(depth, self.r, self.inflection)[: last + 1]:
            n -= min(r, n // 2)
            left.append(n)
        return tuple(left)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Merge down to `k` patches."""
        return merged(state, matched(state, k))


def matched(state: TowerState, k: int) -> Matching:
    """Bipartite matching of a block's keys that leaves `k` patches."""
    protected = state.cls_rows > 0
    return bipartite(state.attended().keys, state.patches - k, protected=protected)


def merged(state: TowerState, found: Matching) -> TowerState:
    """Means of what was matched, weighted by what each row stands for."""
    return state.regroup(join(state.hidden, found, state.mass), found.kept, found.moved)
