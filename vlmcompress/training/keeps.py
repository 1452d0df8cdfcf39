"""How much a training keeps: always the same, or drawn for each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.keep import AutoKeep, parse_keep

Spacing = Literal["log", "uniform"]
_STREAM = 11  # keeps these numbers apart from others that are drawn with the same seed


@dataclass(frozen=True)
class KeepRange:
    """Budgets from `low` to `high`, both fractions or both counts.

    Attributes:
        low: the smallest.
        high: the largest; the same for a fixed one.
        spacing: whether their logarithms or they themselves are drawn evenly.
    """

    low: float | int
    high: float | int
    spacing: Spacing = "log"

    def __post_init__(self) -> None:
        """Check both ends.

        Raises:
            ConfigError: for ends of two kinds, in the wrong order, or that are no budgets.
        """
        for end in (self.low, self.high):
            if isinstance(parse_keep(end), AutoKeep):
                raise ConfigError(f"keep is {end!r}, which is no number; give 0.1 or 0.02:0.5.")
        if isinstance(self.low, int) != isinstance(self.high, int) or self.low > self.high:
            raise ConfigError(
                f"keep is {self.low}:{self.high}; give two fractions or two counts, the smaller "
                "first, such as 0.02:0.5 or 4:64."
            )
        if self.spacing not in get_args(Spacing):
            raise ConfigError(
                f"The budgets' spacing is {self.spacing!r}; allowed are "
                f"{', '.join(map(repr, get_args(Spacing)))}."
            )

    @classmethod
    def parse(cls, text: str, spacing: Spacing = "log") -> KeepRange:
        """`0.1`, `64`, `0.02:0.5` or `4:64`.

        Raises:
            ConfigError: for anything else.
        """
        low, colon, high = text.partition(":")
        first = _number(low, text)
        return cls(first, _number(high, text) if colon else first, spacing)

    @property
    def fixed(self) -> bool:
        """Whether nothing is drawn."""
        return self.low == self.high

    @property
    def middle(self) -> float | int:
        """The budget half way, as the draws are spaced; fractions with two significant digits."""
        if self.spacing == "log":
            middle = math.sqrt(self.low * self.high)
        else:
            middle = (self.low + self.high) / 2
        return round(middle) if isinstance(self.low, int) else float(f"{middle:.2g}")

    def at(self, step: int, seed: int) -> float | int:
        """The budget of a step, which depends on no other: a resumed run draws the same.

        Args:
            step: of the optimiser, from 0.
            seed: of the run.
        """
        if self.fixed:
            return self.low
        share = float(np.random.default_rng([_STREAM, seed, step]).random())
        if isinstance(self.low, int):
            return min(int(self.high), math.floor(self._between(self.low, self.high + 1, share)))
        return min(self.high, max(self.low, self._between(self.low, self.high, share)))

    def _between(self, low: float, high: float, share: float) -> float:
        if self.spacing == "uniform":
            return low + (high - low) * share
        return low * (high / low) ** share

    def to_list(self) -> list[float | int]:
        """JSON-ready."""
        return [self.low, self.high]


def _number(text: str, whole: str) -> float | int:
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        raise ConfigError(
            f"keep is {whole!r}; allowed are a fraction such as 0.1, a count such as 64, or a "
            "range of either such as 0.02:0.5."
        ) from None
