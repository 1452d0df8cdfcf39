"""What a tuned pipeline must hold: a floor on accuracy, or a ceiling on the time to first token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vlmcompress.core.errors import ConfigError

_SECONDS = {"ms": 1e-3, "s": 1.0}
_TIME = re.compile(r"(?P<number>[0-9.]+)\s*(?P<unit>ms|s)?")


@dataclass(frozen=True)
class Goal:
    """What is admissible, and how sure the choice must be.

    Attributes:
        keep_accuracy: share of the full model's mean score that must be kept; the cheapest
            pipeline that does is wanted.
        max_cost: most that a pipeline may cost, as a share of the full model; the most accurate
            pipeline below it is wanted.
        max_seconds: the same in seconds to the first token.
        alpha: largest probability that what is chosen is not admissible.
    """

    keep_accuracy: float | None = None
    max_cost: float | None = None
    max_seconds: float | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ConfigError: for no goal or several, or values out of range.
        """
        given = [v for v in (self.keep_accuracy, self.max_cost, self.max_seconds) if v is not None]
        if len(given) != 1:
            raise ConfigError(
                f"Give a floor on accuracy or a ceiling on the time, one of them; got {len(given)}."
            )
        _share("The accuracy to keep", self.keep_accuracy)
        _share("The largest share of the time", self.max_cost)
        _share("alpha", self.alpha)
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigError(f"The longest time is {self.max_seconds!r} s; it must be above 0.")

    @property
    def ceiling(self) -> float | None:
        """The limit on costs, in its own unit; None where the goal is a floor."""
        return self.max_cost if self.max_cost is not None else self.max_seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dict(vars(self))

    def __str__(self) -> str:
        """As a reader is told."""
        if self.keep_accuracy is not None:
            return f"at least {100 * self.keep_accuracy:g} % of the full model's score"
        if self.max_cost is not None:
            return f"at most {100 * self.max_cost:g} % of the full model's cost"
        return f"at most {1e3 * (self.max_seconds or 0):g} ms to the first token"


def ceiling_of(text: str) -> dict[str, float]:
    """The ceiling that a user writes: `0.6` is a share of the full model, `150ms` and `0.2s` times.

    Returns:
        `max_cost` or `max_seconds`, as `Goal` takes them.

    Raises:
        ConfigError: for anything else.
    """
    match = _TIME.fullmatch(text.strip())
    try:
        number = float(match["number"]) if match else None
    except ValueError:
        number = None
    if match is None or number is None:
        raise ConfigError(
            f"The ceiling is {text!r}; allowed are a share of the full model's time such as 0.6, "
            "and times such as 150ms and 0.2s."
        )
    if match["unit"] is None:
        return {"max_cost": number}
    return {"max_seconds": number * _SECONDS[match["unit"]]}


def _share(what: str, value: float | None) -> None:
    if value is not None and not 0 < value < 1:
        raise ConfigError(f"{what} is {value!r}; it must lie between 0 and 1, both excluded.")
