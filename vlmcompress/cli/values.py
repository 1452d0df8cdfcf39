"""Options of the command line as the values that the library takes."""

from __future__ import annotations

from vlmcompress.core.errors import ConfigError


def keep_of(text: str) -> float | int | str:
    """`0.1` is a fraction, `64` a count, `auto` is decided per image.

    Raises:
        ConfigError: for anything else.
    """
    if text == "auto":
        return text
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ConfigError(
            f"keep is {text!r}; allowed are a fraction such as 0.1, a count such as 64 and auto."
        ) from None


def words(text: str, separator: str = ",") -> list[str]:
    """A comma-separated list, or one with another separator.

    Raises:
        ConfigError: when it is empty.
    """
    found = [word.strip() for word in text.split(separator) if word.strip()]
    if not found:
        raise ConfigError(f"{text!r} is an empty list; separate values by {separator!r}.")
    return found
