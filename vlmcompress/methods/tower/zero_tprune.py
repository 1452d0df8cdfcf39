"""Zero-TPrune: tokens go by likeness and by rank in the attention graph (arXiv 2305.17328)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigTypeError
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.ops.merging import cosine
from vlmcompress.methods.ops.topk import descending, top_k
from vlmcompress.methods.options import Layer, check_count, check_layers, check_share
from vlmcompress.methods.tower.base import TowerReducer, TowerState, layers_within

#: Heads whose scores (of mean 1) vary less or more say nothing or too much of a few tokens.
_VARIANCE = (0.01, 0.7)


@dataclass(frozen=True)
class ZeroTPrune(TowerReducer):
    """Prunes similar tokens, then unimportant ones, between the attention and the MLP of a block.

    Importance is a weighted page rank: a head's attention map is a graph in which every token hands
    its score on to those it attends to, round by round from equal scores; heads whose scores vary
    too little or too much are left out, and the others joined by the root of the mean of their
    squares (I-stage). Of the patches ranked by one round of that, each of the less important half
    is compared with the more important half by its keys, and the most similar go (S-stage); then
    the I-stage, in the graph that is left, drops the least important. [CLS] votes and stays.

    The paper finds layers, and how many tokens go by either rule in each, by a search per model;
    here the layers are at quarters of the tower, the same share stays in each, and `similar` of
    what goes, at most a half of the patches, goes by likeness. Written from descriptions of
    the paper, which itself was not at hand; there is no released code to compare with.

    Attributes:
        layers: blocks that prune.
        similar: share of the pruned tokens that go by likeness.
        rounds: of voting in the first quarter of the tower, its middle and its last quarter.
    """

    name: ClassVar[str] = "zero_tprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.17328"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    looks_at: ClassVar[tuple[str, ...]] = ("attention", "keys")
    layers: tuple[Layer, ...] = (0.25, 0.5, 0.75)
    similar: float = 0.5
    rounds: tuple[int, int, int] = (30, 5, 1)

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, self.layers)
        check_share(self.name, "similar", self.similar)
        if not isinstance(self.rounds, tuple) or len(self.rounds) != 3:
            raise ConfigTypeError(f"{self.name}'s rounds are {self.rounds!r}; give three ints.")
        for rounds in self.rounds:
            check_count(self.name, "rounds", rounds)

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """Geometric over the layers."""
        layers = layers_within(self.name, self.layers, depth, last)
        k = self.final(n, keep)
        left = [max(k, m) for m in schedules.geometric(n, k, len(layers))]
        return schedules.at_layers(n, layers, left, last + 1)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Keep `k` patches, in the order they came."""
        return state.select(self._kept(layer, state, k))

    @torch.no_grad()
    def _kept(self, layer: int, state: TowerState, k: int) -> Tensor:
        graph = state.attended().weights()
        first, n = state.cls_rows, state.patches
        going = min(int(self.similar * (n - k)), n // 2)
        rows = torch.arange(first + n, device=graph.device).expand(len(graph), -1)
        if going:
            gone = _redundant(state, page_rank(graph, 1), going)
            stays = torch.ones_like(rows, dtype=torch.bool).scatter_(1, gone, False)
            rows = rows[stays].view(len(rows), -1)
            graph = torch.take_along_dim(graph, rows[:, None, :, None], 2)
            graph = torch.take_along_dim(graph, rows[:, None, None], 3)
        scores = page_rank(graph, self._rounds(layer, state.depth))[:, first:]
        best = top_k(scores, k) + first
        return rows.gather(1, torch.cat([rows.new_zeros(len(rows), first), best], 1))

    def _rounds(self, layer: int, depth: int) -> int:
        part = 0 if 4 * layer < depth else 2 if 4 * layer >= 3 * depth else 1
        return self.rounds[part]


def page_rank(graph: Tensor, rounds: int) -> Tensor:
    """Importance of every row of an attention map ([b, heads, n, n]): [b, n]."""
    scores = graph.new_ones(graph.shape[:3])
    for _ in range(rounds):
        scores = (scores[:, :, None] @ graph)[:, :, 0]
        scores = scores / scores.mean(2, keepdim=True)
    low, high = _VARIANCE
    spread = scores.var(2, correction=0)
    heads = ((spread >= low) & (spread <= high)).to(scores.dtype)
    # With no head inside, all of them are asked.
    heads = torch.where(heads.sum(1, keepdim=True) > 0, heads, 1)[..., None]
    return ((scores.square() * heads).sum(1) / heads.sum(1)).sqrt()


def _redundant(state: TowerState, scores: Tensor, going: int) -> Tensor:
    """Rows of the less important half most like one of the more important: [b, going]."""
    order = descending(scores[:, state.cls_rows :]) + state.cls_rows
    upper, lower = order.tensor_split([order.shape[1] - order.shape[1] // 2], 1)
    keys = state.attended().k.transpose(1, 2).flatten(2)
    one, other = (torch.take_along_dim(keys, rows[..., None], 1) for rows in (lower, upper))
    best = cosine(one, other).amax(2)
    return lower.gather(1, descending(best)[:, :going])
