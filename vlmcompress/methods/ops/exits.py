"""The threshold of an early exit from passes that did not leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.options import check_number

#: A threshold that no cosine reaches.
NEVER = 1.5


@dataclass(frozen=True)
class Passage:
    """One pass through all layers.

    Attributes:
        similar: [depth] how alike the states before and behind each layer are.
        same: [depth] bool, whether leaving behind that layer would have given the same token.
    """

    similar: Tensor
    same: Tensor


@dataclass(frozen=True)
class ExitFit:
    """A threshold and what it was fitted to.

    Attributes:
        threshold: cosine at which to leave; 1.5 never to.
        first: the earliest layer behind which passes leave.
        layers: mean share of the layers that is run.
        agreement: share of the passes whose token stays the same.
    """

    threshold: float
    first: int
    layers: float
    agreement: float


def fit_threshold(
    passages: Sequence[Passage],
    *,
    first: int = 0,
    layers: float | None = None,
    agreement: float | None = None,
) -> ExitFit:
    """The threshold that agrees most within a share of layers, or runs least while it agrees.

    What leaving early does to later passes over the same cache is not seen.

    Args:
        passages: at least one.
        first: the earliest layer behind which passes may leave.
        layers: most of the layers that may be run, on average over passages, in (0, 1].
        agreement: least share of passages whose token must stay the same, in [0, 1].

    Raises:
        ConfigError: without passages, without one of the two, or for what cannot be met.
    """
    if not passages:
        raise ConfigError("An early exit is fitted to 0 passes; give at least one prompt.")
    if (layers is None) == (agreement is None):
        raise ConfigError(
            f"layers is {layers} and agreement is {agreement}; give one of them, and the other "
            "follows."
        )
    fits = _all_fits(passages, first)
    if layers is not None:
        check_number("early_exit", "layers", layers, 0, 1)
        within = [fit for fit in fits if fit.layers <= layers]
        if not within:
            least = min(fit.layers for fit in fits)
            raise ConfigError(
                f"early_exit cannot run {layers} of the layers: behind the first layer at which "
                f"it may leave {least:.3f} have been run. Allow more, or an earlier first layer."
            )
        return max(within, key=lambda fit: (fit.agreement, fit.threshold))
    check_number("early_exit", "agreement", agreement, 0, 1)
    agreeing = [fit for fit in fits if agreement is not None and fit.agreement >= agreement]
    return min(agreeing, key=lambda fit: (fit.layers, -fit.threshold))


def _all_fits(passages: Sequence[Passage], first: int) -> list[ExitFit]:
    """What comes of every threshold that makes a difference."""
    similar = torch.stack([passage.similar for passage in passages]).double()
    same = torch.stack([passage.same for passage in passages])
    depth = similar.shape[1]
    may = similar[:, first : depth - 1]
    # Below the least of the best similarities everything has left as early as it can.
    steps = [-1.0, *sorted(set(may.flatten().tolist())), NEVER]
    fits = []
    for threshold in steps:
        reached = torch.cat([may >= threshold, torch.ones(len(may), 1, dtype=torch.bool)], 1)
        leaves = first + reached.to(torch.uint8).argmax(1)
        if first >= depth - 1:
            leaves = torch.full_like(leaves, depth - 1)
        agrees = same.gather(1, leaves[:, None]).double().mean()
        share = (leaves + 1).double().mean() / depth
        fits.append(ExitFit(threshold, first, float(share), float(agrees)))
    return fits
