"""LoRA that is on for some questions of a sweep and off for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from vlmcompress.hub import lora


@contextmanager
def switchable(model: Any, folder: Path) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Put an adapter's LoRA into a model for the body, switched off.

    Args:
        model: without LoRA, unpatched; so it is afterwards.
        folder: of the adapter.

    Yields:
        What switches it on for a body of its own. Off, the model computes what it did without.

    Raises:
        ConfigError, CheckpointError: for LoRA that cannot be used, or was made for another model.
        MissingExtraError: without peft.
    """

    @contextmanager
    def on() -> Iterator[None]:
        model.enable_adapters()
        try:
            yield
        finally:
            model.disable_adapters()

    undo = lora.put(model, *lora.read_lora(folder))
    try:
        model.disable_adapters()
        yield on
    finally:
        undo()
