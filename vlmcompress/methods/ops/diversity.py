"""Choosing tokens that differ from one another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmcompress.methods.ops.topk import descending

_LISTED = 16  # neighbours that `thin_out` remembers of each token
_AT_ONCE = 128  # rows that `covering` corrects together: they stay in the cache of a core


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
    changed, which is a smaller share of tokens at every step; in float64, where such sums are all
    but exact.

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
    gains = similarity.new_zeros(b, n, dtype=torch.float64)
    for part in torch.split(similarity, _AT_ONCE, 1):
        gains += part.clamp(min=0).sum(1, dtype=torch.float64)
    nothing = n * n * torch.finfo(gains.dtype).eps  # what rounding may leave of a gain of 0
    taken = torch.zeros_like(weights, dtype=torch.bool)
    picked: list[Tensor] = []
    while len(picked) < k:
        value = torch.where(gains > nothing, gains * weights, 0).masked_fill_(taken, -torch.inf)
        picked.append(value.argmax(1))
        taken[units, picked[-1]] = True
        now = torch.maximum(covered, similarity[units, :, picked[-1]])
        rows = (now > covered).any(0).nonzero()[:, 0]
        # What a token adds to a row falls from max(0, s - covered) to max(0, s - now).
        for some in torch.split(rows, _AT_ONCE):
            low, high = covered[:, some], now[:, some]
            left = similarity[:, some].clamp(low[..., None], high[..., None])
            gains -= left.sum(1, dtype=torch.float64)
            gains += low.sum(1, keepdim=True, dtype=torch.float64)
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
        among = torch.stack(
            [
                unit.index_select(0, rows).index_select(1, rows)
                for unit, rows in zip(similarity, order, strict=True)
            ]
        )
        # Lists of neighbours run dry as tokens go: they are made anew when half are gone.
        order = order.gather(1, _thin_out(among, k, max(k, order.shape[1] // 2), at_once))
    return order


def _thin_out(similarity: Tensor, k: int, stop: int, at_once: int) -> Tensor:
    """Rounds of `thin_out` until at most `stop` of all tokens are left: [b, <= stop] tokens."""
    b, m, _ = similarity.shape
    near = similarity.topk(min(_LISTED, m), dim=2)
    order = torch.arange(m, device=similarity.device).expand(b, m)
    while order.shape[1] > stop:
        some, others = order[:, ::2], order[:, 1::2]
        between = torch.zeros(b, m, dtype=torch.bool, device=order.device)
        between.scatter_(1, others, True)
        worst = descending(_highest(similarity, near.values, near.indices, some, between))
        dropped = min(at_once, order.shape[1] - k)
        order = torch.cat([some.gather(1, worst[:, dropped:]), others], 1)
    return order


def _highest(
    similarity: Tensor, values: Tensor, indices: Tensor, rows: Tensor, among: Tensor
) -> Tensor:
    """How similar each of `rows` is to the most similar of some tokens.

    Args:
        similarity: [b, m, m].
        values: [b, m, t] the highest similarities of each token.
        indices: [b, m, t] to whom.
        rows: [b, r] tokens.
        among: [b, m] bool, the tokens they are compared with.

    Returns:
        [b, r]: the highest on a token's list that is in `among`; where none is, the highest of its
        whole row.
    """
    (b, r), (_, m, t) = rows.shape, values.shape
    flat = (rows + m * torch.arange(b, device=rows.device)[:, None]).flatten()
    listed = indices.view(b * m, t).index_select(0, flat)
    there = among.gather(1, listed.view(b, r * t)).view(b, r, t)
    found = values.view(b * m, t).index_select(0, flat).view(b, r, t)
    highest = torch.where(there, found, -torch.inf).amax(2)
    unit, place = highest.isneginf().nonzero(as_tuple=True)
    whole = similarity[unit, rows[unit, place]]
    highest[unit, place] = torch.where(among[unit], whole, -torch.inf).amax(1)
    return highest
