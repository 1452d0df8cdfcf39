"""The contract of methods that give a tower's queries fewer keys: `AttentionSparsifier`."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vlmcompress.core import keep as keeping
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.tower.base import TowerAttention, TowerReducer, TowerState

#: Products of queries and keys that are held at once.
HELD = 1 << 22


class AttentionSparsifier(TowerReducer):
    """Inside the tower: every patch goes on, and its query looks at some of the keys.

    What is reduced is the work of attention. `keep` is what stays of a query's keys, as a share or
    a count; no visual token goes, and a method after the tower has a `keep` of its own.
    """

    def tokens_kept(self, n: int, keep: float | int) -> int:
        """All patches."""
        return n

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """All patches in every layer."""
        self.connections(n, keep, depth, last)
        return (n,) * (last + 1)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Nothing goes."""
        return state

    def keys_kept(self, n: int, keep: float | int | None) -> int:
        """Keys that a query looks at, of n patches; n stands for all rows, [CLS] too.

        Raises:
            ConfigError: without a budget.
        """
        return keeping.count(self.budgeted(keep, 0.25), n)

    @abstractmethod
    def connections(
        self, n: int, keep: float | int | None, depth: int, last: int
    ) -> tuple[int, ...]:
        """Keys that a query looks at in each layer from 0 to `last`; n where it looks at all.

        Args:
            n: patches.
            keep: share or count of keys.
            depth: layers of the tower, for layers given as shares.
            last: the last layer whose output is read.

        Raises:
            ConfigError: for layers after `last`, or without a budget.
        """

    @abstractmethod
    def attend(
        self, layer: int, attention: TowerAttention, k: int, cls_rows: int, parts: Learned | None
    ) -> Tensor:
        """What attention gives before its output projection.

        Args:
            layer: index of the block.
            attention: its queries, keys and values.
            k: keys that a query looks at.
            cls_rows: leading rows that are no patches.
            parts: what the method has learnt.

        Returns:
            [b, heads, n, head_dim] in the dtype of the values.
        """


def connected_attention(attention: TowerAttention, keys: Tensor | None, rows: slice) -> Tensor:
    """Softmax attention of some queries over keys of their own: [b, heads, queries, head_dim].

    All products of these queries are made and those of other keys hidden: gathering keys for each
    query saves products and takes many times as long. The softmax is in float32.

    Args:
        attention: queries, keys and values of all rows.
        keys: [b, heads, queries, k] rows that each query looks at; None for all.
        rows: which queries.
    """
    assert attention.v is not None  # a sparsifier is handed values always
    logits = (attention.q[:, :, rows] @ attention.k.transpose(-1, -2)).float() * attention.scale
    if keys is not None:
        hidden = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, keys, False)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1).to(attention.v.dtype) @ attention.v


def query_blocks(attention: TowerAttention, first: int) -> list[slice]:
    """All queries from `first` on, as many at once as bound what is held for them."""
    b, heads, n, _ = attention.q.shape
    size = max(1, HELD // (b * heads * n))
    return [slice(i, min(n, i + size)) for i in range(first, n, size)]
