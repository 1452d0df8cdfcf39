"""PiToMe: in every block tokens merge where they crowd (arXiv 2405.16148)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.ops.merging import Matching, behind, bipartite, crowded, join
from vlmcompress.methods.options import Layer, check_layers, check_number
from vlmcompress.methods.tower.base import Place, TowerReducer, TowerState, layers_within


@dataclass(frozen=True)
class PiToMeTower(TowerReducer):
    """Energy-based merging between the attention and the MLP of every block.

    A token's energy is the mean over all patches of elu(cosine - margin) of the block's keys, the
    margin falling from `margin` in the first block to 0 after the last; the 2 r patches of highest
    energy are paired by similarity and the others protected (§3.2, Algorithm 1). The same share
    stays in every block, such that `keep` is met exactly; `ratio` gives the share instead, as
    published. At most half of a block's patches go. [CLS] never merges.

    Means are weighted by how many patches each row stands for, and later blocks add the log of that
    to the keys' logits; the released code computes the first for timm models only and leaves the
    second out everywhere. `faithful=True` follows its code for HuggingFace CLIP: merging after the
    whole block, hidden states compared, plain means, no weighing of keys, and plain bipartite
    matching in the blocks up to the 13th of 24. Rows that leave the tower are in raster order.
    `pitome` is the same rule, applied once to the tower's output.

    Attributes:
        layers: blocks that merge; all whose output is used when not given.
        ratio: share of patches kept in each of them, in place of `keep`.
        margin: of the energy in the first block, in [-1, 1].
        proportional: whether keys are weighed by what they stand for.
        faithful: whether the released code for CLIP is followed.
    """

    name: ClassVar[str] = "pitome_tower"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.16148"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    looks_at: ClassVar[tuple[str, ...]] = ("keys",)
    layers: tuple[Layer, ...] | None = None
    ratio: float | None = None
    margin: float = 0.9
    proportional: bool = True
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        if self.layers is not None:
            check_layers(self.name, self.layers)
        check_number(self.name, "margin", self.margin, -1, 1)
        if self.ratio is not None:
            check_number(self.name, "ratio", self.ratio, 0, 1)
            if self.ratio < 0.5:
                raise ConfigError(
                    f"{self.name}'s ratio is {self.ratio!r}; at most half of a block's patches "
                    "can merge, so it must be in [0.5, 1]."
                )

    @property
    def place(self) -> Place:
        """After the block in the released code for CLIP."""
        return "after" if self.faithful else "between"

    @property
    def weighs_keys(self) -> bool:
        """Proportional attention, which the released code leaves out."""
        return self.proportional and not self.faithful

    @property
    def own_budget(self) -> bool:
        """With a ratio."""
        return self.ratio is not None

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """Geometric over the layers, never more than half at once."""
        layers = layers_within(self.name, self.layers, depth, last)
        if self.ratio is None:
            plan = schedules.geometric(n, self.final(n, keep), len(layers))
            left = schedules.halving(self.name, n, plan)
        else:
            ratio = self.ratio
            left = schedules.repeated(
                n, len(layers), lambda now: now - min(int(now - now * ratio), now // 2)
            )
        return schedules.at_layers(n, layers, left, last + 1)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Merge down to `k` patches."""
        found = self._matched(layer, state, state.patches - k)
        weights = torch.ones_like(state.mass) if self.faithful else state.mass
        return state.regroup(join(state.hidden, found, weights), found.kept, found.moved)

    def _matched(self, layer: int, state: TowerState, r: int) -> Matching:
        metric = state.hidden.detach() if self.faithful else state.attended().keys
        if self.faithful and layer <= state.depth // 2:
            return bipartite(metric, r, protected=state.cls_rows > 0)
        margin = self.margin * (1 - layer / state.depth)
        return behind(crowded(metric[:, state.cls_rows :], r, margin=margin), state.cls_rows)
