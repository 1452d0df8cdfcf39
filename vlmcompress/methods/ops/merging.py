"""Merging tokens: bipartite matching (ToMe), matching by energy (PiToMe), means of groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.ops.topk import descending


@dataclass(frozen=True)
class Matching:
    """Which rows of a sequence stay and which become part of them.

    Attributes:
        kept: [b, k] rows that stay, in the order in which the released code leaves them.
        moved: [b, n] place in `kept` of the row that each row becomes part of.
    """

    kept: Tensor
    moved: Tensor

    @classmethod
    def of(cls, kept: Tensor, source: Tensor, target: Tensor) -> Matching:
        """From rows that stay ([b, k]) and rows `source` that join rows `target` ([b, r] each)."""
        b, k = kept.shape
        place = kept.new_zeros(b, k + source.shape[1])
        place.scatter_(1, kept, torch.arange(k, device=kept.device).expand(b, k))
        return cls(kept, place.scatter(1, source, place.gather(1, target)))


@torch.no_grad()
def bipartite(metric: Tensor, r: int, *, protected: bool = False) -> Matching:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, §3): even rows against odd rows.

    The `r` even rows that are most similar (cosine) to an odd row join it; ties go to the lower
    row. Order: even rows that stay, most similar first, then the odd rows.

    Args:
        metric: [b, n, d] what is compared.
        r: rows to merge, at most half of the unprotected ones.
        protected: whether row 0 ([CLS]) neither joins nor is reordered; rows that stay then keep
            their order.
    """
    scores = cosine(metric[:, ::2], metric[:, 1::2])
    if protected:
        scores[:, 0] = -torch.inf
    partner = scores.argmax(2)
    best = scores.gather(2, partner[..., None])[..., 0]
    order = descending(best)
    source, rest = order[:, :r], order[:, r:]
    if protected:
        rest = rest.sort(1).values
    odd = torch.arange(1, metric.shape[1], 2, device=metric.device).expand(len(metric), -1)
    return Matching.of(torch.cat([2 * rest, odd], 1), 2 * source, 2 * partner.gather(1, source) + 1)


@torch.no_grad()
def energies(metric: Tensor, margin: float) -> Tensor:
    """Energy of each row (PiToMe, §3.2): mean over all rows of elu(cosine - margin), [b, n].

    High where many similar rows crowd.
    """
    return _energies(cosine(metric, metric), margin)


def _energies(similar: Tensor, margin: float) -> Tensor:
    return elu(similar - margin, inplace=True).mean(2)


@torch.no_grad()
def crowded(metric: Tensor, r: int, *, margin: float) -> Matching:
    """Energy-based matching (PiToMe, arXiv 2405.16148, Algorithm 1).

    Of the `2 r` rows of highest energy every other one, beginning with the first, joins the most
    similar of those between them; all others are protected. Order: protected rows from high energy
    to low, then the rows that were joined.

    Args:
        metric: [b, n, d] what is compared.
        r: rows to merge, at most n // 2.
        margin: of the energy.
    """
    similar = cosine(metric, metric)
    ranking = descending(_energies(similar, margin))
    mergeable, protected = ranking[:, : 2 * r], ranking[:, 2 * r :]
    source, joined = mergeable[:, ::2], mergeable[:, 1::2]
    partner = torch.stack(
        [
            unit.index_select(0, rows).index_select(1, columns).argmax(1)
            for unit, rows, columns in zip(similar, source, joined, strict=True)
        ]
    )
    return Matching.of(torch.cat([protected, joined], 1), source, joined.gather(1, partner))


def by_rank(metric: Tensor, r: int, *, margin: float) -> Matching:
    """Bipartite matching in the order of energy (PiToMe's ablation): even ranks against odd."""
    ranking = descending(energies(metric, margin))
    found = bipartite(_rows(metric, ranking), r)
    moved = torch.empty_like(ranking).scatter_(1, ranking, found.moved)
    return Matching(ranking.gather(1, found.kept), moved)


def last_of_each(metric: Tensor, k: int) -> Matching:
    """ToMe's k-th bipartite variant: in every group of `k` rows the last is a destination.

    The others join the most similar destination of any group; rows after the last whole group are
    refused.

    Args:
        metric: [b, n, d], n a multiple of `k`.
        k: rows per group, at least 2.
    """
    rows = torch.arange(metric.shape[1], device=metric.device).view(-1, k)
    kept = rows[:, -1].expand(len(metric), -1)
    source = rows[:, :-1].flatten().expand(len(metric), -1)
    partner = cosine(_rows(metric, source), _rows(metric, kept)).argmax(2)
    return Matching.of(kept, source, kept.gather(1, partner))


def group_sum(values: Tensor, moved: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """Weighted sums over groups: [b, k, d] in float32 or better.

    Deterministic on every device, and a unit's sums do not depend on its batch. Gradients reach
    every row of a group.

    Args:
        values: [b, n, d].
        moved: [b, n] group of each row, -1 for none.
        k: how many groups.
        weights: [b, n]; 1 when not given.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    with torch.autocast(values.device.type, enabled=False):
        rows = values.to(wide)
        rows = rows if weights is None else rows * weights.to(wide)[..., None]
        # A CPU adds rows one after the other. Elsewhere that would be in any order, so a product.
        add = _sum_by_index if values.device.type == "cpu" else _sum_by_product
        return add(rows, moved, k)


def _sum_by_index(rows: Tensor, moved: Tensor, k: int) -> Tensor:
    """Sums [b, k, d] over groups, at the price of reading every row once."""
    b, _, d = rows.shape
    first = (k + 1) * torch.arange(b, device=moved.device)[:, None]
    group = first + torch.where(moved < 0, k, moved)  # the last group is thrown away
    total = rows.new_zeros(b * (k + 1), d).index_add(0, group.flatten(), rows.flatten(0, 1))
    return total.view(b, k + 1, d)[:, :k]


def _sum_by_product(rows: Tensor, moved: Tensor, k: int) -> Tensor:
    """Sums [b, k, d] over groups by one matrix product per unit."""
    groups = torch.arange(k, device=moved.device)[:, None]
    return torch.stack(
        [(group == groups).to(unit.dtype) @ unit for unit, group in zip(rows, moved, strict=True)]
    )


def group_mean(values: Tensor, moved: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """Weighted means over groups: [b, k, d] in the dtype of `values`; 0 for an empty group."""
    total = group_sum(values, moved, k, weights)
    share = torch.ones_like(moved, dtype=total.dtype) if weights is None else weights
    mass = group_sum(share[..., None], moved, k)
    return (total / torch.where(mass > 0, mass, 1)).to(values.dtype)


def join(values: Tensor, found: Matching, weights: Tensor) -> Tensor:
    """Weighted means of rows and those that join them: [b, k, d] in the dtype of `values`.

    Equal to `group_mean`, at the price of the rows that move instead of all of them.

    Args:
        values: [b, n, d].
        found: which rows stay and which join them; none are dropped.
        weights: [b, n], positive.
    """
    k = found.kept.shape[1]
    r = values.shape[1] - k
    stays = torch.zeros_like(found.moved).scatter_(1, found.kept, 1)
    joining = stays.argsort(dim=1, stable=True)[:, :r]
    share = (weights / _totals(found, joining, weights).gather(1, found.moved)).to(torch.float32)
    wide = torch.promote_types(values.dtype, torch.float32)
    kept = _rows(values, found.kept).to(wide) * share.gather(1, found.kept)[..., None]
    added = _rows(values, joining).to(wide) * share.gather(1, joining)[..., None]
    return (kept + group_sum(added, found.moved.gather(1, joining), k)).to(values.dtype)


def _totals(found: Matching, joining: Tensor, weights: Tensor) -> Tensor:
    """[b, k] sums of weights."""
    total = weights.gather(1, found.kept).double()
    more = weights.gather(1, joining).double()
    return total.scatter_add(1, found.moved.gather(1, joining), more)


def behind(found: Matching, rows: int) -> Matching:
    """A matching of the rows after the first `rows`, with those in their places before it."""
    if rows == 0:
        return found
    first = torch.arange(rows, device=found.kept.device).expand(len(found.kept), -1)
    return Matching(*(torch.cat([first, x + rows], 1) for x in (found.kept, found.moved)))


def regrouped(
    tokens: VisualTokens, features: Tensor, source: Tensor, moved: Tensor, *, raster: bool = True
) -> VisualTokens:
    """`tokens.regroup`, with the new rows in the order of their representatives.

    Args:
        tokens: before.
        features: [b, k, d] of the new rows.
        source: [b, k] current row that represents each new one.
        moved: [b, n] new row that each current one became part of, -1 where dropped.
        raster: whether new rows are put in the order of `source`; else they stay as they are.
    """
    if not raster:
        return tokens.regroup(features.to(tokens.features.dtype), source, moved)
    order = source.argsort(1)
    place = order.argsort(1).gather(1, moved.clamp(min=0))
    moved = torch.where(moved < 0, -1, place)
    features = _rows(features, order).to(tokens.features.dtype)
    return tokens.regroup(features, source.gather(1, order), moved)


def merge_down(
    tokens: VisualTokens,
    metric: Tensor | None,
    k: int,
    match: Callable[[Tensor, int], Matching],
    *,
    raster: bool = True,
    by_mass: bool = True,
) -> VisualTokens:
    """Match and merge until `k` rows are left; a round merges half of the rows at most.

    Args:
        tokens: [b, n, d].
        metric: [b, n, e] what is compared, averaged along with the features; None compares those.
        k: rows left.
        match: the rule, called with the metric and how many rows to merge.
        raster: whether rows keep the order of their representatives, between rounds and at the end.
        by_mass: whether a row counts as often as it stands for tokens, or once.
    """
    # Rounded to the features' dtype once, whatever the number of rounds.
    dtype = tokens.features.dtype
    wide = torch.promote_types(dtype, torch.float32)
    metric = None if metric is None else metric.float()
    tokens = dataclasses.replace(tokens, features=tokens.features.to(wide))
    while tokens.n > k:
        compared = tokens.features.detach() if metric is None else metric
        found = match(compared, min(tokens.n // 2, tokens.n - k))
        weights = tokens.mass if by_mass else None
        features = group_mean(tokens.features, found.moved, found.kept.shape[1], weights)
        if metric is not None:
            metric = group_mean(metric, found.moved, found.kept.shape[1], weights)
            metric = _rows(metric, found.kept.argsort(1)) if raster else metric
        tokens = regrouped(tokens, features, found.kept, found.moved, raster=raster)
    return dataclasses.replace(tokens, features=tokens.features.to(dtype))


def nearest(features: Tensor, rows: Tensor) -> Tensor:
    """The most similar (cosine) of some rows for every row, [b, n] places in `rows` ([b, k]).

    Each of `rows` is its own nearest, duplicates or not.
    """
    with torch.no_grad():
        place = cosine(features, _rows(features, rows)).argmax(2)
    number = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return place.scatter(1, rows, number)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` ([b, k]) of `values` ([b, n, d])."""
    return torch.take_along_dim(values, index[..., None], 1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines [b, n, m] in float32; one product per unit, whatever its batch."""
    with torch.autocast(a.device.type, enabled=False):
        left, right = normalize(a.float(), dim=-1), normalize(b.float(), dim=-1)
        return torch.stack([x @ y.T for x, y in zip(left, right, strict=True)])
