"""A schedule of FitPrune fitted to attention statistics and a budget (arXiv 2409.10197, §3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.options import check_number

#: What layers cost that work on so many rows, in attention and in MLP.
Cost: TypeAlias = Callable[[Sequence[tuple[int, int]]], float]


@dataclass(frozen=True)
class Sample:
    """What the visual tokens of one prompt receive in each layer of an unpruned model.

    Attributes:
        own: [layers, n] from visual rows, summed up after the maximum over heads.
        cross: [layers, n] the same from the text behind the images.
        text: rows of the prompt that are not visual.
    """

    own: Tensor
    cross: Tensor
    text: int


@dataclass(frozen=True)
class Fit:
    """A schedule and what it was fitted to.

    Attributes:
        left: share of the visual tokens left behind each layer.
        tolerance: the share of attention that a layer's drops may take with them.
        cost: share of the unpruned model's cost, meaned over samples.
    """

    left: tuple[float, ...]
    tolerance: float
    cost: float


def fit(samples: Sequence[Sample], cost: Cost, budget: float) -> Fit:
    """The schedule of the smallest tolerance whose cost is within a budget.

    At a tolerance, a layer drops the largest set of least attended tokens that together receive
    less than this share of the layer's attention: of that from visual rows and of that from text
    alike, so those that are in both sets. What one layer dropped is gone for the next. Shares left
    are averaged over samples.

    The released code takes the layers' sets one by one, with tokens removed before a layer out of
    its sums; whether the paper does so is unverified. Here sums are those of the unpruned layer,
    so that a larger tolerance never drops less and the search finds the optimum; and shares are
    averaged, not counts rounded down, since prompts differ in their number of tokens.

    Args:
        samples: at least one, with equally many layers.
        cost: of the rows that go through each layer's attention and MLP.
        budget: share of the unpruned model's cost, in (0, 1].

    Raises:
        ConfigError: without samples, or for a budget that dropping tokens cannot meet.
    """
    check_number("fitprune", "budget", budget, 0, 1)
    if not samples:
        raise ConfigError("fitprune is fitted to 0 samples; give at least one with an image.")
    limits = [tolerances(sample) for sample in samples]
    full = _mean_cost(samples, cost, (1.0,) * len(limits[0]))
    # Schedules change only where a tolerance passes that of some token.
    steps = torch.cat([limit.flatten() for limit in limits]).unique().tolist()  # type: ignore[no-untyped-call]
    candidates = [*steps, math.nextafter(steps[-1], math.inf)]
    low, high = 0, len(candidates) - 1
    least = _mean_cost(samples, cost, shares_left(limits, candidates[-1])) / full
    if least > budget:
        raise ConfigError(
            f"fitprune cannot bring the prefill down to {budget} of its cost: {least:.3f} is left "
            "when all but one visual token go in the first layer. Allow more, or drop tokens "
            "before the language model."
        )
    while low < high:
        middle = (low + high) // 2
        within = _mean_cost(samples, cost, shares_left(limits, candidates[middle])) / full <= budget
        low, high = (low, middle) if within else (middle + 1, high)
    left = shares_left(limits, candidates[low])
    return Fit(left, candidates[low], _mean_cost(samples, cost, left) / full)


def tolerances(sample: Sample) -> Tensor:
    """Tolerance above which each token is gone behind each layer: [layers, n] float64."""
    needed = torch.maximum(_running_shares(sample.own), _running_shares(sample.cross))
    return needed.cummin(0).values


def shares_left(limits: Sequence[Tensor], tolerance: float) -> tuple[float, ...]:
    """Mean share of the tokens left behind each layer at a tolerance; one token is left always."""
    each = [(limit >= tolerance).sum(1).clamp(min=1).double() / limit.shape[1] for limit in limits]
    return tuple(torch.stack(each).mean(0).tolist())


def _running_shares(received: Tensor) -> Tensor:
    """Share of each row's sum that its values up to this one make, from small to large: [l, n].

    Ties are taken from the last token on, as they are dropped.
    """
    values = received.double().flip(1)
    values, order = values.sort(dim=1, stable=True)
    total = values.sum(1, keepdim=True)
    shares = values.cumsum(1) / torch.where(total > 0, total, 1)
    return torch.zeros_like(shares).scatter(1, order, shares).flip(1)


def _mean_cost(samples: Sequence[Sample], cost: Cost, left: Sequence[float]) -> float:
    return math.fsum(cost(_lengths(sample, left)) for sample in samples) / len(samples)


def _lengths(sample: Sample, left: Sequence[float]) -> list[tuple[int, int]]:
    """Rows in each layer's attention and MLP; tokens go between the two."""
    n = sample.own.shape[1]
    behind = [sample.text + keeping.count(share, n) for share in left]
    return list(zip([sample.text + n, *behind[:-1]], behind, strict=True))
