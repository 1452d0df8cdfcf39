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
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=-1).values
