"""Deterministic selection of the best tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int, last: Tensor | None = None) -> Tensor:
    """Indices of the k largest scores per row, ascending; ties go to the lower index.

    Args:
        scores: [b, n].
        k: how many, 1 <= k <= n.
        last: [b, n] bool, those that come after all others, whatever their scores.

    Returns:
        [b, k] int64.
    """
    order = descending(scores)
    if last is not None:
        behind = last.gather(1, order).long()
        order = order.gather(1, behind.sort(dim=-1, stable=True).indices)
    return order[:, :k].sort(dim=-1).values


def among_best(values: Tensor, k: int) -> Tensor:
    """Whether each value is one of the k largest of the last dimension; ties go to the lower index.

    The first k of `descending` as a mask, without sorting what is not among them.

    Args:
        values: [..., n].
        k: how many, 0 <= k <= n.

    Returns:
        [..., n] bool.
    """
    if k == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    last = values.topk(k, dim=-1).values[..., -1:]
    above, level = values > last, values == last
    room = k - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))


def descending(values: Tensor) -> Tensor:
    """Indices that sort the last dimension from high to low; ties go to the lower index."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def ranks(values: Tensor) -> Tensor:
    """Place of each value of the last dimension from high to low; ties go to the lower index."""
    order: Tensor = descending(values).argsort(dim=-1)
    return order
