"""Which budgets weights were trained for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.core.keep import AutoKeep, Keep, parse_keep

TrainedKeep: TypeAlias = tuple[float, float] | tuple[int, int]
"""Lowest and highest budget: shares in (0, 1], or counts."""


def parse_trained_keep(value: object) -> TrainedKeep:
    """A range of budgets, checked.

    Raises:
        ConfigTypeError: for anything but two numbers.
        ConfigError: for numbers that are no budgets, a share beside a count, and a lowest that is
            above the highest.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ConfigTypeError(
            f"trained_keep is {value!r}; give the lowest and the highest budget, as [0.05, 0.2]."
        )
    low, high = (parse_keep(each) for each in value)
    if isinstance(low, AutoKeep) or isinstance(high, AutoKeep):
        raise ConfigTypeError(f"trained_keep is {value!r}; 'auto' is no budget to be trained for.")
    if type(low) is not type(high):
        raise ConfigError(
            f"trained_keep is {value!r}, a share beside a count; give two shares or two counts."
        )
    if low > high:
        raise ConfigError(f"trained_keep is {value!r}; the lowest budget comes first.")
    return low, high


def within(keep: Keep, trained: TrainedKeep) -> bool:
    """Whether a budget lies in the range; a share is not comparable with counts, nor 'auto'."""
    low, high = trained
    return type(keep) is type(low) and low <= keep <= high
