"""Adapters: folders with a configuration, what its methods learnt, and LoRA where there is some."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcompress.core.config import CONFIG_NAME, CompressionConfig, StageConfig
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.extras import require
from vlmcompress.live.install import outer_model
from vlmcompress.live.patch import patch

if TYPE_CHECKING:
    from vlmcompress.live.handle import Handle

#: Name under which PEFT keeps what it has trained.
PEFT_CONFIG = "adapter_config.json"


def load_adapter(model: Any, folder: str | Path, **options: Any) -> Handle:
    """Patch a model as an adapter says.

    Args:
        model: what the adapter was trained for, unpatched. LoRA weights, where the folder holds
            some, are put into it and stay when the patch is removed.
        folder: with `vlmcompress_config.json`, the files that it names, and perhaps PEFT's.
        options: further arguments of `patch`, such as `processor`.

    Returns:
        The handle.

    Raises:
        ConfigError: for a folder without a configuration, or made for another model.
        CheckpointError: for weights that cannot be used.
        MissingExtraError: for LoRA without peft.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{folder} is no adapter: it holds no {CONFIG_NAME}. Name a folder that "
            "`vlmcompress train` wrote."
        )
    config = CompressionConfig.load(folder)
    stages = tuple(_located(stage, folder) for stage in config.stages)
    if (folder / PEFT_CONFIG).is_file():
        require("peft")
        outer_model(model).load_adapter(str(folder))
    return patch(model, dataclasses.replace(config, stages=stages), **options)


def _located(stage: StageConfig, folder: Path) -> StageConfig:
    """A stage whose weights are named by their place, not by their name in the folder.

    Raises:
        ConfigError: for weights outside the folder.
    """
    weights = stage.options.get("weights")
    if not isinstance(weights, str):
        return stage
    path = folder / weights
    if path.resolve().parent != folder.resolve():
        raise ConfigError(
            f"The adapter {folder} names weights {weights!r}; they must lie beside its "
            f"{CONFIG_NAME}."
        )
    return dataclasses.replace(stage, options={**stage.options, "weights": str(path)})
