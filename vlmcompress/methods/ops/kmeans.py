"""K-means by cosine, all units of a batch at once, and what tells how many clusters there are.

Rows are of unit length. Nothing here draws from the global random state, and a unit's clusters do
not depend on the others of its batch. It starts as k-means++ (Arthur and Vassilvitskii, 2007) does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.ops.merging import group_mean, group_sum

#: Added to every squared distance that k-means++ draws by, as VQToken's released code does.
_FLOOR = 1e-6
#: Between the generators of two seeds; there are fewer centres.
_STRIDE = 1_000_003


@dataclass(frozen=True)
class Clusters:
    """Rows and the cluster each belongs to.

    Attributes:
        labels: [b, n] int64 cluster of each row.
        centres: [b, k, d] float32 or better, not of unit length.
    """

    labels: Tensor
    centres: Tensor

    @property
    def k(self) -> int:
        """Clusters, empty ones included."""
        return self.centres.shape[1]


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 or better; zeros stay zeros."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


@torch.no_grad()
def seeds(
    x: Tensor,
    k: int,
    seed: int,
    *,
    candidates: int = 4,
    weights: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Starting centres by greedy k-means++: [b, k, d], different rows of each unit.

    The first is drawn evenly. For every other one some rows are drawn with a chance in proportion
    to their squared distance to the nearest centre so far, and the one that leaves the smallest sum
    of these distances is taken; a single candidate is plain k-means++. All units draw with the same
    numbers, made by generators of their own on the CPU; centre i has its numbers whatever k is.

    Args:
        x: [b, n, d] of unit length.
        k: centres, at most n.
        seed: of the draws.
        candidates: rows drawn for each centre.
        weights: [b, n] how often each row counts; once when not given.
        given: [b, m, d] centres that there are already and that come first.

    Raises:
        ConfigError: when there are fewer rows than centres.
    """
    b, n, _ = x.shape
    if not 1 <= k <= n:
        raise ConfigError(f"{n} tokens have no {k} clusters; ask for 1 to {n}.")
    mass = x.new_ones(b, n) if weights is None else weights.to(x.dtype)
    centres = [] if given is None else list(given.unbind(1))
    gap = torch.full_like(mass, 4.0)  # the largest squared distance of two rows
    if given is not None:
        gap = (2 - 2 * _products(x, unit(given))).amin(2).clamp(min=0)
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    for i in range(len(centres), k):
        # The largest of weight / Exp(1) is a draw by weight, without a running sum to be rounded.
        race = _exponential(seed, i, candidates if centres else 1, n).to(x.device)
        chance = (mass * (gap + _FLOOR))[:, None] / race
        rows = chance.masked_fill(chosen[:, None], -1).argmax(2)
        left = (2 - 2 * _products(x, _rows(x, rows))).clamp(min=0)
        left = torch.minimum(gap[..., None], left)
        best = (mass[..., None] * left).double().sum(1).argmin(1, keepdim=True)
        gap = torch.take_along_dim(left, best[:, None], 2)[..., 0]
        row = rows.gather(1, best)
        chosen = chosen.scatter(1, row, True)
        centres.append(_rows(x, row)[:, 0])
    return torch.stack(centres, 1)


def _exponential(seed: int, i: int, candidates: int, n: int) -> Tensor:
    """[candidates, n] positive draws from Exp(1) for centre i."""
    generator = torch.Generator().manual_seed((seed * _STRIDE + i) % 2**63)
    draws = torch.empty(candidates, n).exponential_(generator=generator)
    return draws.clamp(min=torch.finfo(draws.dtype).tiny)


@torch.no_grad()
def kmeans(
    x: Tensor,
    start: Tensor,
    *,
    iterations: int,
    tolerance: float = 1e-4,
    weights: Tensor | None = None,
) -> Clusters:
    """Clusters by cosine, from given centres.

    In turn every row joins the centre of the highest cosine and every centre becomes the plain mean
    of its rows; one without rows stays where it is. A unit is done when its centres would move by
    less than `tolerance` (Frobenius norm of all of them); they do not move any more then. These are
    the update and the stop of VQToken's released code. Waits for the device once an iteration.

    Args:
        x: [b, n, d] of unit length.
        start: [b, k, d] centres; their length does not matter.
        iterations: at most, at least 1.
        tolerance: that ends a unit's iterations.
        weights: [b, n] how often each row counts; once when not given.
    """
    centres, k = start.to(x.dtype), start.shape[1]
    share = x.new_ones(x.shape[:2]) if weights is None else weights.to(x.dtype)
    weighted = x if weights is None else x * share[..., None]
    labels = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    running = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        labels = torch.where(running[:, None], _products(x, unit(centres)).argmax(2), labels)
        mass = group_sum(share[..., None], labels, k)
        means = group_sum(weighted, labels, k) / torch.where(mass > 0, mass, 1)
        means = torch.where(mass > 0, means, centres)
        running = running & ((means - centres).flatten(1).norm(dim=1) >= tolerance)
        if not bool(running.any()):
            break
        centres = torch.where(running[:, None, None], means, centres)
    return Clusters(labels, centres)


@torch.no_grad()
def filled(x: Tensor, clusters: Clusters) -> Tensor:
    """Labels ([b, n]) that leave no cluster empty, for at least as many rows as clusters.

    Every empty cluster takes one row: those least like the centre they belong to go, ties to the
    lower row; no cluster loses the row that is most like its centre.

    Args:
        x: [b, n, d] of unit length.
        clusters: of these rows.
    """
    labels, k = clusters.labels, clusters.k
    empty = _sizes(labels, k) == 0
    if not bool(empty.any()):
        return labels
    centres = _rows(unit(clusters.centres), labels)
    like = (x * centres).sum(2)
    mine = labels[..., None] == torch.arange(k, device=labels.device)
    best = torch.where(mine, like[..., None], -torch.inf).argmax(1)
    n = labels.shape[1]
    held = labels.new_zeros(len(labels), n + 1, dtype=torch.bool)
    held = held.scatter(1, torch.where(empty, n, best), True)[:, :n]
    like = like.masked_fill(held, torch.inf)
    spare = like.sort(dim=1, stable=True).indices
    i, cluster = empty.nonzero(as_tuple=True)
    rank = (empty.cumsum(1) - 1)[i, cluster]
    labels = labels.clone()
    labels[i, spare[i, rank]] = cluster
    return labels


def in_order(labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Labels renumbered by first appearance, and the first row of each: [b, n] and [b, k].

    First rows ascend. No cluster may be empty.
    """
    first = first_rows(labels, k)
    order = first.argsort(1)
    return order.argsort(1).gather(1, labels), first.gather(1, order)


def first_rows(labels: Tensor, k: int) -> Tensor:
    """[b, k] the first row of each cluster; n for an empty one."""
    n = labels.shape[1]
    rows = torch.arange(n, device=labels.device).expand_as(labels)
    return labels.new_full((len(labels), k), n).scatter_reduce(1, labels, rows, "amin")


@torch.no_grad()
def distortion(x: Tensor, clusters: Clusters) -> Tensor:
    """Sum of squared distances of the rows ([b, n, d]) to their centres: [b] float64."""
    own = _rows(clusters.centres, clusters.labels)
    return (x - own).square().sum(2).double().sum(1)


@torch.no_grad()
def silhouette(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """Mean silhouette (Rousseeuw, 1987) by cosine distance: [b] in [-1, 1], float64.

    Exact at the price of one product of rows and means: the mean cosine distance of a row to those
    of a cluster is 1 minus its product with their mean. A row alone in its cluster has 0.

    Args:
        x: [b, n, d] of unit length.
        labels: [b, n] cluster of each row.
        k: clusters, some of which may be empty.
    """
    size = _sizes(labels, k).double()
    to_mean = 1 - _products(x, group_mean(x, labels, k)).double()
    own_size = size.gather(1, labels)
    own = to_mean.gather(2, labels[..., None])[..., 0]
    to_itself = 1 - x.double().square().sum(2)  # not 0 for a row of zeros
    within = (own * own_size - to_itself) / (own_size - 1).clamp(min=1)
    other = to_mean.masked_fill((size == 0)[:, None], torch.inf)
    beyond = other.scatter(2, labels[..., None], torch.inf).amin(2)
    wide = torch.maximum(within, beyond)
    score = (beyond - within) / wide.clamp(min=torch.finfo(wide.dtype).tiny)
    return torch.where((own_size > 1) & beyond.isfinite(), score, 0).mean(1)


def elbow(distortions: Tensor) -> Tensor:
    """[b] the trial at which the curve of distortions bends most, from [b, trials].

    The largest second difference, the first of equals. Ends have none; of fewer than three trials
    the first is taken.
    """
    if distortions.shape[1] < 3:
        return torch.zeros(len(distortions), dtype=torch.int64, device=distortions.device)
    return distortions.diff(n=2, dim=1).argmax(1) + 1


def _sizes(labels: Tensor, k: int) -> Tensor:
    """[b, k] int64 rows of each cluster."""
    zeros = labels.new_zeros(len(labels), k)
    return zeros.scatter_add(1, labels, torch.ones_like(labels))


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` ([b, k]) of `values` ([b, n, d])."""
    return torch.take_along_dim(values, index[..., None], 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [b, n, k]; one matrix product per unit, whatever its batch."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.stack([x @ y.T for x, y in zip(a, b, strict=True)])
