"""What an adapter's folder holds, checked as far as that goes without a model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from vlmcompress.core.config import CONFIG_NAME, CompressionConfig, StageConfig
from vlmcompress.core.errors import CheckpointError, ConfigError

#: Names under which PEFT keeps what it has trained; the last is a pickle, which is never read.
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"

RESULTS, CARD, RECIPE = "results.json", "README.md", "recipe.yaml"
EVAL_RESULTS = ".eval_results"
SAFE = ".safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        folder: where it lies.
        config: as it stands in the file.
        lora: whether PEFT's files lie beside it.
    """

    folder: Path
    config: CompressionConfig
    lora: bool

    @property
    def located(self) -> CompressionConfig:
        """The configuration with its weights named by their place."""
        stages = tuple(_located(stage, self.folder) for stage in self.config.stages)
        return dataclasses.replace(self.config, stages=stages)

    @property
    def files(self) -> list[str]:
        """Names of everything in the folder that is part of the adapter."""
        return sorted(name for name in part_names(self.config) if (self.folder / name).is_file())


def part_names(config: CompressionConfig) -> list[str]:
    """Names that the files of an adapter of this configuration may have."""
    own = [weights for weights in map(_weights, config.stages) if weights is not None]
    return [CONFIG_NAME, *own, PEFT_CONFIG, PEFT_WEIGHTS, RESULTS, RECIPE, CARD]


def read(folder: str | Path) -> Adapter:
    """The adapter in a folder.

    Raises:
        ConfigError, ConfigTypeError: for a folder that holds none, a configuration that cannot be
            read or is newer, and weights that do not lie beside it.
        CheckpointError: for LoRA without its weights as safetensors.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{folder} is no adapter: it holds no {CONFIG_NAME}. Name a folder that "
            "`vlmcompress.hub.save` or `vlmcompress train` wrote."
        )
    config = CompressionConfig.load(folder)
    for stage in config.stages:
        _check_weights(stage, folder)
    lora = (folder / PEFT_CONFIG).is_file()
    if lora and not (folder / PEFT_WEIGHTS).is_file():
        pickled = (folder / PEFT_PICKLE).is_file()
        held = f"{PEFT_PICKLE}, a pickle, which can run code and is never read" if pickled else ""
        raise CheckpointError(
            f"{folder} holds {PEFT_CONFIG} and no {PEFT_WEIGHTS}{held and f', but {held}'}; save "
            "it with a peft that writes safetensors."
        )
    return Adapter(folder, config, lora)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path: of the file.
        what: it should be, for messages.

    Raises:
        ConfigError: when it is missing or anything else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is no {what} ({error}); give a JSON file.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is no {what}: it holds a {type(data).__name__}, not an object.")
    return data


def _weights(stage: StageConfig) -> str | None:
    weights = stage.options.get("weights")
    return weights if isinstance(weights, str) else None


def _check_weights(stage: StageConfig, folder: Path) -> None:
    """Refuse weights that lie elsewhere, and files that could run code.

    A file's own place is not looked at: in the Hub's cache all files are links.
    """
    weights = _weights(stage)
    if weights is None:
        return
    if PurePath(weights).name != weights or "\\" in weights or weights == "..":
        raise ConfigError(
            f"The adapter {folder} names weights {weights!r}; they must lie beside its "
            f"{CONFIG_NAME}."
        )
    if not weights.endswith(SAFE) and (folder / weights).is_file():
        raise CheckpointError(
            f"The adapter {folder} names weights {weights!r}; only {SAFE} files are read, since "
            "others can run code when they are."
        )


def _located(stage: StageConfig, folder: Path) -> StageConfig:
    weights = _weights(stage)
    if weights is None:
        return stage
    return dataclasses.replace(stage, options={**stage.options, "weights": str(folder / weights)})
