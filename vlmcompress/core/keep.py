"""How many tokens are kept.

`keep` always means *kept*: a float in (0, 1] is a fraction of each image's tokens, an int is a
count per image, `"auto"` (or `AutoKeep`) is decided per image from the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeAlias

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError, ConfigTypeError

_ALLOWED = (
    "allowed are a float in (0, 1] (a fraction of each image's tokens), an int >= 1 (a count per "
    "image) or 'auto'"
)


@dataclass(frozen=True)
class AutoKeep:
    """The smallest k whose scores reach the share `tau` of their sum, image by image."""

    tau: float = 0.9

    def __post_init__(self) -> None:
        """Check that `tau` is a share."""
        if isinstance(self.tau, bool) or not isinstance(self.tau, Real):
            raise ConfigTypeError(f"AutoKeep.tau is {self.tau!r}; it must be a float in (0, 1].")
        if not 0 < self.tau <= 1:
            raise ConfigError(f"AutoKeep.tau is {self.tau!r}; it must be in (0, 1].")


Keep: TypeAlias = float | int | AutoKeep


def parse_keep(keep: object) -> Keep:
    """Validate what a user passed as `keep`.

    Returns:
        An `int`, a `float` in (0, 1] or an `AutoKeep`.

    Raises:
        ConfigTypeError: for bools and for anything that is no number and not `"auto"`.
        ConfigError: for NaN, zero, negative numbers, floats above 1 and unknown strings.
    """
    if isinstance(keep, AutoKeep):
        return keep
    if isinstance(keep, str):
        if keep == "auto":
            return AutoKeep()
        raise ConfigError(f"keep is {keep!r}; {_ALLOWED}.")
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise ConfigTypeError(f"keep is {keep!r} ({type(keep).__name__}); {_ALLOWED}.")
    if isinstance(keep, Integral):
        if int(keep) < 1:
            raise ConfigError(f"keep is {int(keep)}; {_ALLOWED}.")
        return int(keep)
    if not 0 < float(keep) <= 1:  # NaN fails every comparison
        raise ConfigError(f"keep is {float(keep)!r}; {_ALLOWED}.")
    return float(keep)


def count(keep: float | int, n: int) -> int:
    """Tokens kept of `n`: for a fraction `floor(n * keep + 0.5)`, at least 1; ints are clamped."""
    if isinstance(keep, int):
        return min(n, keep)
    return min(n, max(1, math.floor(n * keep + 0.5)))


def auto_count(scores: Tensor, tau: float) -> Tensor:
    """Smallest k whose largest scores sum to the share `tau` of all scores.

    Args:
        scores: [b, n], non-negative.
        tau: share of the sum in (0, 1].

    Returns:
        [b] int64 counts between 1 and n.
    """
    ordered = scores.double().sort(dim=-1, descending=True).values
    reached = ordered.cumsum(-1)
    total = reached[:, -1:]
    # The comparison tolerates rounding of the running sum, so that tau = 1 can be reached before n.
    short = reached < tau * total * (1 - 1e-12)
    return (short.sum(-1) + 1).clamp(max=scores.shape[-1]).to(torch.int64)
