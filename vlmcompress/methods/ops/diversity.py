"""Choosing tokens that differ from one another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmcompress.methods.ops.topk import descending


@torch.no_grad()
def select(features: Tensor, k: int) -> Tensor:
    """Greedy max-min selection by cosine distance, in selection order.

    The first pick is the token whose nearest neighbour is farthest; each later pick is the token
    whose nearest *picked* token is farthest. Picked tokens never return, and ties go to the lower
    index. O(n^2 d + k n), in float32 also under autocast.

    Args:
        features: [b, n, d]; an all-zero row is at distance 1 from every other.
        k: how many, 1 <= k <= n.

    Returns:
        [b, k] int64.
    """
    distance = cosine_distance(features)
    diagonal = distance.diagonal(dim1=1, dim2=2)
    diagonal.fill_(torch.inf)
    picked = [distance.amin(2).argmax(1)]
    diagonal.fill_(-torch.inf)  # the row of a pick then also takes the pick out of the race
    units = torch.arange(len(distance), device=distance.device)
    nearest = distance[units, picked[0]]
    while len(picked) < k:
        picked.append(nearest.argmax(1))
        nearest = torch.minimum(nearest, distance[units, picked[-1]])
    return torch.stack(picked, 1)


def cosine(features: Tensor) -> Tensor:
    """Cosine between all tokens of each unit: [b, n, n] float32 from [b, n, d].

    One product per unit, so that a unit's values do not depend on its batch.
    """
    with torch.autocast(features.device.type, enabled=False):
        units = normalize(features.float(), dim=-1)
        return torch.stack([unit @ unit.T for unit in units])


def cosine_distance(features: Tensor) -> Tensor:
    """1 - cosine between all tokens of each unit: [b, n, n] float32 from [b, n, d]."""
    return 1 - cosine(features)


@torch.no_grad()
def determinantal(kernel: Tensor, fallback: Tensor, k: int) -> Tensor:
    """Greedy most probable subset of a determinantal point process, in selection order.

    Each pick has the largest variance that the earlier picks do not explain; the Cholesky factor of
    the picked rows grows by one row per pick (Chen et al., arXiv 1709.05135, Algorithm 1).
    O(k^2 n). Picked tokens never return, and ties go to the lower index. Where the kernel's rank is
    used up (or nothing is left within rounding), the best of `fallback` follow.

    Args:
        kernel: [b, n, n] float32, positive semi-definite.
        fallback: [b, n] in [0, 1], ranks tokens that add nothing.
        k: how many, 1 <= k <= n.

    Returns:
        [b, k] int64.
    """
    b, n, _ = kernel.shape
    units = torch.arange(b, device=kernel.device)
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    exhausted = left.amax(1, keepdim=True) * n * torch.finfo(kernel.dtype).eps
    factor = kernel.new_zeros(b, k, n)
    picked: list[Tensor] = []
    for step in range(k):
        # Variances are positive and the fallback lies below them.
        pick = torch.where(left > exhausted, left, fallback - 3).masked_fill(left.isneginf(), -4)
        at = pick.argmax(1)
        variance = left[units, at][:, None]
        known = factor[units, :step, at][:, None] @ factor[:, :step]
        row = (kernel[units, at] - known[:, 0]) / variance.clamp(min=exhausted).sqrt()
        factor[:, step] = torch.where(variance > exhausted, row, 0)
        left = left - factor[:, step].square()
        left[units, at] = -torch.inf
        picked.append(at)
    return torch.stack(picked, 1)


@torch.no_grad()
def covering(similarity: Tensor, weights: Tensor, k: int) -> Tensor:
    """Greedy weighted coverage, in selection order.

    A token is covered by its most similar picked token (by 0 at first). Each pick has the largest
    weight times gain, the gain being what it adds to the coverage of all tokens. Picked tokens
    never return, and ties go to the lower index. Gains are kept, and corrected where coverage
    changed, which is a smaller share of tokens at every step.

    Args:
        similarity: [b, n, n] float32.
        weights: [b, n], non-negative.
        k: how many, 1 <= k <= n.

    Returns:
        [b, k] int64.
    """
    b, n, _ = similarity.shape
    units = torch.arange(b, device=similarity.device)
    covered = similarity.new_zeros(b, n)
    gains = similarity.clamp(min=0).sum(1, dtype=torch.float64)
    taken = torch.zeros_like(weights, dtype=torch.bool)
    picked: list[Tensor] = []
    while len(picked) < k:
        value = (gains * weights).masked_fill(taken, -torch.inf)
        picked.append(value.argmax(1))
        taken[units, picked[-1]] = True
        now = torch.maximum(covered, similarity[units, picked[-1]])
        rows = (now > covered).any(0).nonzero()[:, 0]
        # What a token adds to a row falls from max(0, s - covered) to max(0, s - now).
        part = similarity[:, rows]
        lost = torch.minimum(part, now[:, rows, None]) - covered[:, rows, None]
        gains -= lost.clamp_(min=0).sum(1, dtype=torch.float64)
        covered = now
    return torch.stack(picked, 1)


@torch.no_grad()
def thin_out(similarity: Tensor, order: Tensor, k: int, *, at_once: int = 8) -> Tensor:
    """Drop the most redundant tokens of a list, a few at a time, until `k` are left.

    In each round every other token, beginning with the first, is compared with those between them,
    and the (at most `at_once`) most similar to one of these are dropped. The list goes on as the
    survivors, least similar last dropped first, followed by the tokens between.

    Args:
        similarity: [b, n, n] float32.
        order: [b, m] tokens.
        k: how many stay, 0 <= k <= m.
        at_once: tokens dropped in a round.

    Returns:
        [b, k] int64, a part of `order`.
    """
    if k == 0:
        return order[:, :0]
    while order.shape[1] > k:
        some, others = order[:, ::2], order[:, 1::2]
        redundancy = [
            unit.index_select(0, rows).index_select(1, columns).amax(1)
            for unit, rows, columns in zip(similarity, some, others, strict=True)
        ]
        worst = descending(torch.stack(redundancy))
        dropped = min(at_once, order.shape[1] - k)
        order = torch.cat([some.gather(1, worst[:, dropped:]), others], 1)
    return order
