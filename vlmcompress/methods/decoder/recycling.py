"""Dropped tokens that go on as a few merged ones (SparseVLM, §3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmcompress.methods.ops.density import density_peaks
from vlmcompress.methods.ops.merging import group_mean
from vlmcompress.methods.ops.topk import descending


@dataclass(frozen=True)
class Merged:
    """Rows that clusters of dropped ones became.

    Attributes:
        rows: [B, m, d].
        valid: [B, m] bool, which there are.
        source: [B, m] row at the centre of each.
    """

    rows: Tensor
    valid: Tensor
    source: Tensor


@dataclass(frozen=True)
class Recycling:
    """How many of the dropped are merged, and into how many.

    Attributes:
        share: of the dropped that is pooled; 0 merges none.
        per_cluster: pooled tokens per cluster.
    """

    share: float
    per_cluster: int

    def pooled(self, dropped: int) -> int:
        """The best of so many dropped tokens are merged: int(share * dropped) + 1 of them."""
        if self.share == 0:
            return 0
        return min(dropped, int(self.share * dropped) + 1)

    def clusters(self, dropped: int) -> int:
        """Rows that they become: int(pooled / per_cluster) + 1."""
        pool = self.pooled(dropped)
        return min(pool, pool // self.per_cluster + 1)

    def kept(self, n: int, total: int) -> int:
        """How many of n stay themselves, at least one, when `total` rows are to be left.

        With what the others become they make `total`, where that can be: one more kept is at most
        one cluster less.
        """
        fitting = (k for k in range(total, 0, -1) if k + self.clusters(n - k) <= total)
        return next(fitting, min(1, total))

    def merge(
        self, hidden: Tensor, scores: Tensor, dropped: Tensor, clusters: Sequence[int]
    ) -> Merged:
        """Cluster the best of the dropped rows.

        Args:
            hidden: [B, L, d].
            scores: [B, L], the best are pooled, from the best down.
            dropped: [B, L] bool.
            clusters: how many rows each sample's pool becomes.
        """
        pools = [self.pooled(d) for d in dropped.sum(1).tolist()]
        order = descending(scores.masked_fill(~dropped, -torch.inf))[:, : max(1, *pools)]
        valid = torch.arange(order.shape[1], device=order.device) < _column(pools, order)
        pool = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
        count = _column(clusters, order)
        centres, group = density_peaks(pool.detach(), count[:, 0], valid)
        there = torch.arange(centres.shape[1], device=order.device) < count
        rows = group_mean(pool, group, centres.shape[1])
        return Merged(rows, there, order.gather(1, centres))


def _column(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, device=like.device)[:, None]
