"""Choosing tokens that differ from one another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


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


def cosine_distance(features: Tensor) -> Tensor:
    """1 - cosine between all tokens of each unit: [b, n, n] float32 from [b, n, d].

    One product per unit, so that a unit's values do not depend on its batch.
    """
    with torch.autocast(features.device.type, enabled=False):
        units = normalize(features.float(), dim=-1)
        return torch.stack([1 - unit @ unit.T for unit in units])
