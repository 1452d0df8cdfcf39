"""Every error the library raises on purpose.

Each class derives from `VLMCompressError` and from the builtin a caller would expect, and each
message names the value found, the values allowed and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VLMCompressError(Exception):
    """Base of all errors raised by vlmcompress."""


class ConfigError(VLMCompressError, ValueError):
    """A configuration value is out of range or contradictory."""


class ConfigTypeError(VLMCompressError, TypeError):
    """A configuration value has the wrong type."""


class UnknownMethodError(ConfigError):
    """No compression method of this name is registered."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        """Say which name was asked for, which are near and which are known."""
        known = sorted(known)
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        super().__init__(f"Unknown method {name!r}.{hint} Known methods: {', '.join(known)}.")


class UnsupportedModelError(VLMCompressError, ValueError):
    """The model (or this part of it) cannot be compressed."""


class UnsupportedInputError(VLMCompressError, ValueError):
    """The call carries an input that the patched model cannot compress."""


class AlreadyPatchedError(VLMCompressError, RuntimeError):
    """`patch` was called on a model that is patched already."""


class PlaceholderMismatchError(VLMCompressError, ValueError):
    """Image placeholders in `input_ids` do not match the image features."""


class EvidenceError(VLMCompressError, RuntimeError):
    """What a method wants to look at cannot be read from this model."""


class CacheMismatchError(VLMCompressError, ValueError):
    """A key-value cache does not fit the ids that came with it."""


class CheckpointError(VLMCompressError, RuntimeError):
    """A training checkpoint cannot be written, or cannot be read back."""


class ResultsError(VLMCompressError, RuntimeError):
    """Results of a measurement cannot be written, or another run is writing them."""


class DataError(VLMCompressError, ValueError):
    """Training data cannot be used; the message names the row."""


class MissingTextError(VLMCompressError, ValueError):
    """A text-aware method has neither a processor nor an explicit question."""


class MissingExtraError(VLMCompressError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        """Say which package is missing and which extra of vlmcompress brings it."""
        super().__init__(
            f"{package!r} is needed for this feature and is not installed. "
            f'Install it with: pip install "vlmcompress[{extra}]"'
        )
