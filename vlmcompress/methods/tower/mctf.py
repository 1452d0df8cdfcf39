"""MCTF: similar, uninformative and small tokens are fused (arXiv 2403.10030)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.ops.merging import Matching, cosine, join
from vlmcompress.methods.ops.topk import descending
from vlmcompress.methods.options import Layer, check_count, check_layers, check_number
from vlmcompress.methods.tower.base import Place, TowerReducer, TowerState, layers_within


@dataclass(frozen=True)
class MCTF(TowerReducer):
    """Multi-criteria bipartite fusion of the tokens that enter a block.

    Rows at even places are compared with those at odd places. A pair weighs the more the more
    similar its rows are, the less attention they receive in the block that is about to run, and the
    fewer patches they stand for: the product of the three, each to the power of 1 / tau (§3.2).
    Half of the pairs are fused from even to odd, the other half from odd to the even rows that are
    left, by the same weights (§3.3, bidirectional). A fused row is the mean weighted by attention
    received times patches stood for. At most half of a block's patches go. [CLS] never fuses.

    The attention that a block is about to pay is computed from its own norm and projections. The
    paper then pools that map and spends it as the block's attention; here the block attends anew,
    on the model's own kernel and with keys weighed by the patches they stand for, which is the sum
    of columns that the pooled map holds. The published accuracies are those of fine-tuned towers.

    Attributes:
        layers: blocks that fuse; all whose output is used when not given.
        r: tokens fused before each block, in place of `keep`.
        tau_similarity: of the cosine, moved to [0, 1].
        tau_information: of the inverse of the attention received.
        tau_size: of the inverse of the patches stood for.
        bidirectional: whether half of the pairs are fused the other way.
        proportional: whether keys are weighed by what they stand for.
    """

    name: ClassVar[str] = "mctf"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.10030"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    looks_at: ClassVar[tuple[str, ...]] = ("features", "received attention")
    layers: tuple[Layer, ...] | None = None
    r: int | None = None
    tau_similarity: float = 1.0
    tau_information: float = 20.0
    tau_size: float = 40.0
    bidirectional: bool = True
    proportional: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        if self.layers is not None:
            check_layers(self.name, self.layers)
        if self.r is not None:
            check_count(self.name, "r", self.r, 0)
        for name in ("tau_similarity", "tau_information", "tau_size"):
            check_number(self.name, name, getattr(self, name), 0, 1e6)
            if getattr(self, name) == 0:
                raise ConfigError(f"{self.name}'s {name} is 0; it must be above.")

    @property
    def place(self) -> Place:
        """On the rows that enter a block."""
        return "before"

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
        layers = layers_within(self.name, self.layers, depth, last)
        if self.r is None:
            plan = schedules.linear(n, self.final(n, keep), len(layers))
            left = schedules.halving(self.name, n, plan)
        else:
            r = self.r
            left = schedules.repeated(n, len(layers), lambda now: now - min(r, now // 2))
        return schedules.at_layers(n, layers, left, last + 1)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Fuse down to `k` patches."""
        received = state.attended().received()
        found = self.match(state, received, state.patches - k)
        hidden = join(state.hidden, found, received * state.mass)
        return state.regroup(hidden, found.kept, found.moved)

    @torch.no_grad()
    def match(self, state: TowerState, received: Tensor, r: int) -> Matching:
        """Who fuses with whom.

        Args:
            state: rows to be fused; [CLS] stands at an even place.
            received: [b, n] attention received, averaged over heads and queries.
            r: rows to fuse.
        """
        scores = self._scores(state, received)
        even, odd = (torch.arange(i, received.shape[1], 2, device=scores.device) for i in (0, 1))
        back = r - r // 2 if self.bidirectional else 0
        source, partner, rest, _ = _best(scores, r - back)
        rest = rest.sort(1).values
        sources, targets = [even[source]], [odd[partner]]
        kept = [even[rest], odd.expand(len(scores), -1)]
        if back:
            left = torch.take_along_dim(scores, rest[..., None], 1).transpose(1, 2)
            source, partner, survivors, _ = _best(left, back)
            sources.append(odd[source])
            targets.append(even[rest.gather(1, partner)])
            kept[1] = odd[survivors]
        return _chained(torch.cat(kept, 1), sources, targets)

    def _scores(self, state: TowerState, received: Tensor) -> Tensor:
        """[b, even, odd] float32; -inf for rows that are no patches."""
        x = state.hidden.detach()
        similar = ((cosine(x[:, ::2], x[:, 1::2]) + 1) / 2).clamp(min=0) ** (
            1 / self.tau_similarity
        )
        information = _to_largest(1 / received) ** (1 / self.tau_information)
        size = _to_largest(1 / state.mass) ** (1 / self.tau_size)
        alone = information * size
        scores = similar * alone[:, ::2, None] * alone[:, None, 1::2]
        scores[:, : (state.cls_rows + 1) // 2] = -torch.inf
        return scores


def _to_largest(values: Tensor) -> Tensor:
    return values / values.amax(1, keepdim=True)


def _best(scores: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The r rows of the best pairs, their columns, the other rows (best first), and all scores."""
    best, partner = scores.max(2)
    order = descending(best)
    source = order[:, :r]
    return source, partner.gather(1, source), order[:, r:], best


def _chained(kept: Tensor, sources: list[Tensor], targets: list[Tensor]) -> Matching:
    """A matching in several rounds: targets of one may be sources of the next."""
    n = kept.shape[1] + sum(source.shape[1] for source in sources)
    goes_to = torch.arange(n, device=kept.device).repeat(len(kept), 1)
    for source, target in zip(reversed(sources), reversed(targets), strict=True):
        goes_to = goes_to.scatter(1, source, goes_to.gather(1, target))
    place = torch.zeros_like(goes_to)
    number = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    place.scatter_(1, kept, number)
    return Matching(kept, place.gather(1, goes_to))
