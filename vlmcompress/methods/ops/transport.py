"""Optimal transport with a relaxed source side, by Sinkhorn's iterations in the log domain."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def shares_sent(
    cost: Tensor, pairs: Tensor, *, smoothing: float, strictness: float, iterations: int
) -> Tensor:
    """How much each source sends when every target receives the same: [b, n] float32.

    The plan minimises cost, minus `smoothing` times its entropy, plus `strictness` times the
    Kullback-Leibler divergence of what sources send from an equal share each (Chizat et al. 2018,
    arXiv 1607.05816, Table 1). Were that divergence forced to 0, all sources would send alike.

    Args:
        cost: [b, n, m] of sending from a source to a target.
        pairs: [b, n, m] bool, who may send to whom; sources and targets without partners send and
            receive nothing.
        smoothing: positive.
        strictness: not negative; 0 leaves sources free, so that each target asks for itself.
        iterations: how often both sides are scaled, at least 1; targets last, so that each gets 1.
    """
    kernel = (-cost.float() / smoothing).masked_fill(~pairs, -torch.inf)
    step = strictness / (strictness + smoothing)
    source = torch.zeros_like(kernel[:, :, 0])
    target = torch.zeros_like(kernel[:, 0])
    for _ in range(iterations):
        target = -_log_sum(kernel + source[:, :, None], 1)
        source = -step * _log_sum(kernel + target[:, None], 2)
    target = -_log_sum(kernel + source[:, :, None], 1)
    return (kernel + source[:, :, None] + target[:, None]).exp().sum(2)


def _log_sum(values: Tensor, dim: int) -> Tensor:
    """The logarithm of a sum of exponentials; 0 where there is nothing to sum."""
    return values.logsumexp(dim).nan_to_num(neginf=0.0)
