"""Deterministic selection of the best tokens."""

from __future__ import annotations

from torch import Tensor


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores per row, ascending; ties go to the lower index.

    Args:
        scores: [b, n].
        k: how many, 1 <= k <= n.

    Returns:
        [b, k] int64.
    """
    return descending(scores)[:, :k].sort(dim=-1).values


def descending(values: Tensor) -> Tensor:
    """Indices that sort the last dimension from high to low; ties go to the lower index."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def ranks(values: Tensor) -> Tensor:
    """Place of each value of the last dimension from high to low; ties go to the lower index."""
    order: Tensor = descending(values).argsort(dim=-1)
    return order
