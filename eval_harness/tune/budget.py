"""How much time there is, and what it is for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from vlmcompress.core.errors import ConfigError, VLMCompressError

COSTS, SEARCHED, ALL = 0.25, 0.6, 1.0
"""Shares of the budget by the end of which costs are measured, the search is over, and all is."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class OutOfTime(VLMCompressError, RuntimeError):
    """The next step would not be over before the time is."""


@dataclass
class Budget:
    """The time of a run, which begins now.

    Attributes:
        seconds: None for as long as it takes.
        now: a clock.
    """

    seconds: float | None = None
    now: Callable[[], float] = time.monotonic
    _start: float = field(init=False)
    _until: float = field(init=False, default=ALL)
    _pace: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Check the time, and begin.

        Raises:
            ConfigError: for no time at all.
        """
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"The budget is {self.seconds!r} s; it must be above 0.")
        self._start = self.now()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self.now() - self._start

    @contextmanager
    def until(self, share: float) -> Iterator[None]:
        """Only so much of the budget is for what is done in the body."""
        before, self._until = self._until, share
        try:
            yield
        finally:
            self._until = before

    @contextmanager
    def step(self, kind: str, size: int) -> Iterator[None]:
        """One step; how long it takes says how long the next ones of its kind will.

        Args:
            kind: of the step.
            size: of it, in anything that its time grows with.

        Raises:
            OutOfTime: when it would end too late.
        """
        expected = self._pace.get(kind, 0.0) * size
        if self.seconds is not None and self.spent + expected >= self._until * self.seconds:
            raise OutOfTime(f"{self.spent:.0f} of {self.seconds:.0f} s are spent.")
        start = self.now()
        yield
        self._pace[kind] = (self.now() - start) / max(1, size)


def seconds_of(text: str) -> float:
    """`90s`, `30m`, `2h` in seconds; a bare number is seconds.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None:
        raise ConfigError(f"The budget is {text!r}; allowed are times such as 90s, 30m and 2h.")
    return float(match[1]) * _UNITS[match[2] or "s"]
