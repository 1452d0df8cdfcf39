"""Adapters are not taken outside the budgets that they were trained for."""

from __future__ import annotations

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.keep import AutoKeep, Keep
from vlmcompress.core.trained import within
from vlmcompress.methods.pipeline import Pipeline


def refuse_untrained(built: Pipeline) -> None:
    """Check a pipeline's budget against its configuration's `trained_keep`.

    Raises:
        ConfigError: outside the range, which is named.
    """
    trained, keep = built.config.trained_keep, _budget(built)
    if trained is None or keep is None or within(keep, trained):
        return
    low, high = trained
    what = f"keep={low!r}" if low == high else f"keep from {low!r} to {high!r}"
    kind = "shares of an image's tokens" if isinstance(low, float) else "tokens per image"
    shown = "'auto'" if isinstance(keep, AutoKeep) else repr(keep)
    names = " | ".join(repr(stage.method) for stage in built.config.stages)
    raise ConfigError(
        f"This adapter was trained for {what} ({kind}) with {names}, and keep is {shown}; stay in "
        "that range, or pass force=True."
    )


def _budget(built: Pipeline) -> Keep | None:
    """Of the last stage before the language model, else of the last; None for its own."""
    if built.stages:
        return built.stages[-1].keep
    if built.decoder:
        return built.decoder[-1].keep
    return None if built.tower is None else built.tower.keep
