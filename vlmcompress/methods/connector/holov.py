"""HoloV: a budget for each part of the image, by attention and variety (arXiv 2510.02912, §3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import (
    FeatureSpace,
    Layer,
    Needs,
    TokenCompressor,
    check_count,
    check_layers,
    check_number,
    only_row,
)
from vlmcompress.methods.ops.topk import descending
from vlmcompress.methods.parts import Partition

_SCALE = 1000.0  # the released code's factor on attention
_EPS = 1e-6


@dataclass(frozen=True)
class HoloV(TokenCompressor):
    """Share the budget over runs of the image, then keep the most attended tokens of each run.

    The sequence is cut into `crops` runs of consecutive tokens (of the raster: bands, not squares;
    the first ones a token longer where it does not divide). A run's score is the mean over its
    tokens of the [CLS] attention (mean over heads) and `alpha` times the variance of the token's
    cosines to the run, brought to the same scale; quotas are proportional to it, rounded down, and
    what is left over goes one each to the best runs.

    A quota beyond a run's length goes to the next best runs; the released code fills up with rows
    of zeros instead. Rows come out in raster order; `faithful=True` leaves them as released, run by
    run and by descending attention within.

    Attributes:
        crops: runs; at most one for each token.
        alpha: weight of the variance.
        layer: tower layer whose [CLS] row is read.
        faithful: whether rows stay in the released order.
    """

    name: ClassVar[str] = "holov"
    partition: ClassVar[Partition] = Partition("image", "dropped")
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.02912"
    reads: ClassVar[FeatureSpace] = "llm"
    crops: int = 16
    alpha: float = 0.09
    layer: Layer = -2
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, (self.layer,))
        check_count(self.name, "crops", self.crops)
        check_number(self.name, "alpha", self.alpha, 0, math.inf)

    def needs(self) -> Needs:
        """One [CLS] row."""
        return Needs(cls_attention=(self.layer,))

    @property
    def raster_order(self) -> bool:
        """The released order is none."""
        return not self.faithful

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep each run's quota of its most attended rows."""
        k = self.budget(tokens, keep)
        if k >= tokens.n:
            return tokens
        rows = self._rows(tokens, k)
        return tokens.select(rows if self.faithful else rows.sort(1).values)

    @torch.no_grad()
    def _rows(self, tokens: VisualTokens, k: int) -> Tensor:
        """[b, k] rows, run by run, by descending attention within."""
        attention = only_row(tokens.evidence.cls_attention).float().mean(1)
        b, n = attention.shape
        run = _runs(n, min(self.crops, n)).to(attention.device)
        score = self._run_scores(tokens.features.float(), attention, run)
        quota = _quotas(score, torch.bincount(run), k)
        order = descending(attention)
        order = order.gather(1, run[order].sort(dim=1, stable=True).indices)
        starts = torch.searchsorted(run, run)  # of each row's run, in this order too
        inside = torch.arange(n, device=run.device) - starts
        kept = inside < quota.gather(1, run.expand(b, n))
        rows: Tensor = order[kept].view(b, k)
        return rows

    def _run_scores(self, features: Tensor, attention: Tensor, run: Tensor) -> Tensor:
        """[b, runs] mean over each run of its tokens' scores."""
        scaled = _SCALE * attention
        found = []
        for length, start in _spans(run):
            a = scaled[:, start : start + length]
            variance = _variance(features[:, start : start + length])
            level = a.abs().mean(1) / (variance.abs().mean(1) + _EPS)
            found.append((a + self.alpha * variance * level[:, None]).mean(1))
        return torch.stack(found, 1)


def _runs(n: int, crops: int) -> Tensor:
    """[n] the run of each token; the first `n % crops` runs are one longer."""
    lengths = torch.full((crops,), n // crops)
    lengths[: n % crops] += 1
    return torch.arange(crops).repeat_interleave(lengths)


def _spans(run: Tensor) -> list[tuple[int, int]]:
    """(length, start) of every run."""
    lengths = torch.bincount(run)
    starts = lengths.cumsum(0) - lengths
    return list(zip(lengths.tolist(), starts.tolist(), strict=True))


def _variance(features: Tensor) -> Tensor:
    """[b, n] variance of each token's cosines to the others of its run.

    As released: its own cosine counts as 0 in the sums, which are divided by n - 1.
    """
    n = features.shape[1]
    units = features / (features.norm(dim=2, keepdim=True) + _EPS)
    with torch.autocast(features.device.type, enabled=False):
        similar = torch.stack([unit @ unit.T for unit in units])
    similar.diagonal(dim1=1, dim2=2).zero_()
    others = max(1, n - 1)
    mean = similar.sum(2, keepdim=True) / others
    return (similar - mean).square().sum(2) / others


def _quotas(score: Tensor, room: Tensor, k: int) -> Tensor:
    """[b, runs] int64 tokens of each run: proportional, at most `room`, `k` in all."""
    share = score / (score.sum(1, keepdim=True) + _EPS)
    quota = (k * share).floor().long()
    best = descending(score)
    rank = best.argsort(1)
    quota = torch.minimum(quota + (rank < k - quota.sum(1, keepdim=True)), room)
    # One token at a time to each run with room, best first; as many rounds as it takes.
    while bool(((short := k - quota.sum(1, keepdim=True)) > 0).any()):
        open_runs = (quota < room).gather(1, best)
        turn = open_runs.cumsum(1).gather(1, rank)
        quota = quota + ((quota < room) & (turn <= short))
    return quota
