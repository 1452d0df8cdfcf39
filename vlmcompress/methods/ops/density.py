"""Clusters around peaks of density (DPC-kNN), in batches of different sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmcompress.methods.ops.topk import descending


@torch.no_grad()
def density_peaks(x: Tensor, k: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster rows around those that are dense and far from anything denser (SparseVLM, §3.4).

    Distances are Euclidean over the root of the width. The density of a row is exp of minus the
    mean of its `k` smallest squared distances, its own of 0 among them; its peak is the density
    times the distance to the nearest denser row, or to the farthest pair's for the densest. Of
    equally dense rows the earlier counts as denser, where released codes add noise. The `k` highest
    peaks are centres, and every row belongs to the nearest of them.

    Args:
        x: [b, n, d].
        k: [b] clusters of each, at least 1 and at most its valid rows where there are any.
        valid: [b, n] bool, rows that count.

    Returns:
        [b, max(k)] rows that are centres, highest peak first (those beyond `k` are others), and
        [b, n] the centre, counted from 0, that each row belongs to, -1 for rows that do not count.
    """
    k = k.to(x.device)
    most = max(1, int(k.max()))
    nothing = ~(valid[:, :, None] & valid[:, None])
    apart = torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist")
    apart = apart / x.shape[-1] ** 0.5
    density = _density(apart.masked_fill(nothing, torch.inf), k).masked_fill(~valid, -1.0)
    peak = density * _to_denser(apart, density, nothing)
    centres = descending(peak.masked_fill(~valid, -torch.inf))[:, :most]
    far = apart.gather(2, centres[:, None].expand(-1, x.shape[1], -1))
    beyond = torch.arange(centres.shape[1], device=x.device) >= k[:, None]
    group = far.masked_fill(beyond[:, None], torch.inf).argmin(2)
    # Where rows coincide a centre could be nearer to another one's row than to its own place.
    own = torch.arange(centres.shape[1], device=x.device).expand_as(centres)
    moved = torch.where(beyond, group.gather(1, centres), own)
    group = group.scatter(1, centres, moved)
    return centres, torch.where(valid, group, -1)


def _density(apart: Tensor, k: Tensor) -> Tensor:
    """[b, n] from distances ([b, n, n], infinite where they do not count)."""
    near = apart.square().sort(dim=2).values.cumsum(2)
    last = (k - 1).clamp(min=0, max=near.shape[2] - 1)[:, None, None].expand(-1, near.shape[1], 1)
    total = near.gather(2, last)[..., 0]
    return (-total / k.clamp(min=1)[:, None]).exp()


def _to_denser(apart: Tensor, density: Tensor, nothing: Tensor) -> Tensor:
    """[b, n] distance to the nearest denser row, the longest of all where there is none."""
    rows = torch.arange(density.shape[1], device=density.device)
    earlier = (density[:, None] == density[:, :, None]) & (rows < rows[:, None])
    denser = ((density[:, None] > density[:, :, None]) | earlier) & ~nothing
    nearest = apart.masked_fill(~denser, torch.inf).amin(2)
    longest = apart.masked_fill(nothing, 0).amax((1, 2))
    return torch.where(nearest.isinf(), longest[:, None], nearest)
