"""Checks of methods' options, and layers named by number or by share of depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from vlmcompress.core.errors import ConfigError, ConfigTypeError

Layer: TypeAlias = int | float


def resolve_layer(layer: Layer, depth: int) -> int:
    """Absolute index of a layer in a stack of `depth`.

    Args:
        layer: an int (negative counts from the end) or a float in (0, 1), a share of depth.
        depth: number of layers.

    Raises:
        ConfigTypeError: for a bool or a non-number.
        ConfigError: when the layer does not exist.
    """
    _check_layer(layer)
    if isinstance(layer, float):
        return min(depth - 1, round(layer * depth))
    if not -depth <= layer < depth:
        raise ConfigError(f"Layer {layer} does not exist: the stack has {depth} layers.")
    return layer % depth


def check_layers(method: str, layers: object) -> None:
    """Check a method's layer option before any model is known.

    Args:
        method: name for messages.
        layers: must be a non-empty tuple of ints and of floats in (0, 1).

    Raises:
        ConfigTypeError: for anything that is no tuple of numbers.
        ConfigError: for an empty tuple or a share outside (0, 1).
    """
    if not isinstance(layers, tuple):
        raise ConfigTypeError(f"{method}'s layers are {layers!r}; they must be a tuple of layers.")
    if not layers:
        raise ConfigError(f"{method} needs at least one layer.")
    for layer in layers:
        _check_layer(layer)


def _check_layer(layer: object) -> None:
    if isinstance(layer, bool) or not isinstance(layer, int | float):
        raise ConfigTypeError(f"Layer {layer!r} must be an int or a float in (0, 1).")
    if isinstance(layer, float) and not 0 < layer < 1:
        raise ConfigError(f"Layer {layer!r} is a share of depth and must lie in (0, 1).")


def check_share(method: str, name: str, value: object) -> None:
    """Check an option that must be a number in [0, 1].

    Raises:
        ConfigTypeError: for anything that is no number.
        ConfigError: for a number outside.
    """
    check_number(method, name, value, 0, 1)


def check_count(method: str, name: str, value: object, least: int = 1) -> None:
    """Check an option that must be an int of at least `least`.

    Raises:
        ConfigTypeError: for anything that is no int.
        ConfigError: for a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigTypeError(f"{method}'s {name} is {value!r}; it must be an int >= {least}.")
    if value < least:
        raise ConfigError(f"{method}'s {name} is {value!r}; it must be at least {least}.")


def check_number(method: str, name: str, value: object, low: float, high: float) -> None:
    """Check an option that must be a finite number in [low, high].

    Raises:
        ConfigTypeError: for anything that is no number.
        ConfigError: for a number outside, NaN included.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigTypeError(f"{method}'s {name} is {value!r}; it must be a number.")
    if not (low <= value <= high and math.isfinite(value)):
        raise ConfigError(
            f"{method}'s {name} is {value!r}; it must be finite and lie in [{low:g}, {high:g}]."
        )


def check_choice(method: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Check an option that must be one of a few values.

    Raises:
        ConfigError: for any other, and for bools where numbers are allowed.
    """
    if value not in allowed or isinstance(value, bool) not in map(_is_bool, allowed):
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(f"{method}'s {name} is {value!r}; allowed are {choices}.")


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)
