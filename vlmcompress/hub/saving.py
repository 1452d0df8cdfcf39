"""Adapters written into folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vlmcompress.core.config import CompressionConfig, StageConfig
from vlmcompress.core.errors import CheckpointError, ConfigError
from vlmcompress.families.bare import BareFamily
from vlmcompress.hub import lora
from vlmcompress.hub.about import About, Lookup, describe
from vlmcompress.hub.cards import write_card
from vlmcompress.hub.folder import PEFT_CONFIG, PEFT_PICKLE, PEFT_WEIGHTS, RESULTS, SAFE, read_json
from vlmcompress.hub.results import evaluations
from vlmcompress.live.patch import handle_of
from vlmcompress.live.state import State, state_of

if TYPE_CHECKING:
    from vlmcompress.live.handle import Handle


def save(
    handle: Handle,
    folder: str | Path,
    *,
    trained_keep: Sequence[float] | None = None,
    results: str | Path | Mapping[str, Any] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    name: str | None = None,
) -> Path:
    """Write what a handle applies as an adapter that `load` reads.

    The folder gets `vlmcompress_config.json`; what methods have learnt, and LoRA of the model where
    there is some, as safetensors; `results.json`; and README.md, a card whose numbers all come from
    those results. What others wrote into a README.md that is there stays.

    Args:
        handle: of the patched model.
        folder: made where it is missing.
        trained_keep: lowest and highest budget of the training, both shares or both counts; the
            adapter then refuses others. None leaves the one in force.
        results: a results file, or what is to stand in it (see `vlmcompress.hub.results`); None
            takes the folder's, where it has one.
        base_model: Hub id of the model; found where that was loaded from the Hub.
        license: that of the base model where it can be found, if not given.
        datasets: Hub ids of what was trained on.
        name: of the adapter; the folder's.

    Returns:
        The folder.

    Raises:
        VLMCompressError: for a patch that was removed.
        ConfigError: for values that make no sense, results and cards that cannot be read, several
            LoRA adapters, or a folder with LoRA that the model does not carry.
        CheckpointError: when it cannot be written.
    """
    folder = Path(folder)
    about = about_handle(handle, name or folder.resolve().name, base_model, license, datasets)
    return write(handle, folder, about, trained_keep=trained_keep, results=results)


def about_handle(
    handle: Handle,
    name: str,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    lookup: Lookup | None = None,
) -> About:
    """What the card of a handle says beside its files; see `describe`."""
    about = describe(
        handle.model,
        name,
        base_model=base_model,
        license=license,
        datasets=datasets,
        lookup=lookup,
    )
    if isinstance(_state(handle).family, BareFamily):
        return dataclasses.replace(about, pipeline_tag="image-feature-extraction")
    return about


def write(
    handle: Handle,
    folder: Path,
    about: About,
    *,
    trained_keep: Sequence[float] | None = None,
    results: str | Path | Mapping[str, Any] | None = None,
) -> Path:
    """As `save`, with the card's facts given."""
    config, model = handle.config, handle.model
    if trained_keep is not None:
        config = dataclasses.replace(config, trained_keep=tuple(trained_keep))
    if not lora.has_lora(model):
        refuse_lora_in(folder, f"the adapter of this {type(model).__name__}, which carries none")
    found = None if results is None else _read_results(results)
    _make(folder)
    if found is not None:
        _write_results(folder / RESULTS, found)
    if lora.has_lora(model):
        lora.save(model, folder, about.base_model)
    save_config(save_stages(handle, folder, config), folder)
    write_card(folder, about)
    return folder


def save_stages(
    handle: Handle, folder: Path, config: CompressionConfig | None = None
) -> CompressionConfig:
    """Write what the stages have learnt.

    Args:
        handle: of the patched model.
        folder: made where it is missing.
        config: that is to name the files; the one in force.

    Returns:
        The configuration that names what was written.

    Raises:
        CheckpointError: when it cannot be written.
    """
    _make(folder)
    config = handle.config if config is None else config
    running = _state(handle).settings.pipeline.running
    stages: list[StageConfig] = []
    for stage, run in zip(config.stages, running, strict=True):
        if run.parts is None:
            stages.append(stage)
            continue
        before = sum(each.method == stage.method for each in stages)
        name = f"{stage.method}-{before + 1}{SAFE}" if before else f"{stage.method}{SAFE}"
        run.parts.save(folder / name)
        stages.append(dataclasses.replace(stage, options={**stage.options, "weights": name}))
    return dataclasses.replace(config, stages=tuple(stages))


def save_learned(method: Any, folder: str | Path, **about: Any) -> Path:
    """Write a method with trained weights as an adapter that `learned` and `load` read.

    Args:
        method: with weights.
        folder: made where it is missing.
        about: fields of the card's `About`, such as `base_model` and `license`.

    Returns:
        The folder.

    Raises:
        ConfigError: for a method without weights, or a folder that holds LoRA.
        CheckpointError: when it cannot be written, or its weights are no safetensors.
    """
    folder, weights = Path(folder), _weights_of(method)
    refuse_lora_in(folder, f"{method.name}, which needs none")
    _make(folder)
    target = folder / f"{method.name}{SAFE}"
    try:
        if not target.exists() or not target.samefile(weights):
            shutil.copyfile(weights, target)
    except OSError as error:
        raise CheckpointError(f"{weights} cannot be copied to {folder} ({error}).") from error
    chosen = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    plain = {f.name: f.default for f in dataclasses.fields(method)}
    options = {k: v for k, v in chosen.items() if v != plain[k]} | {"weights": target.name}
    save_config(CompressionConfig((StageConfig(method.name, options=options),)), folder)
    write_card(folder, About(**{"name": folder.resolve().name, **about}))
    return folder


def _weights_of(method: Any) -> Path:
    """The file of a method's weights.

    Raises:
        ConfigError: when it has none.
        CheckpointError: for anything but safetensors, which could run code when it is read.
    """
    weights = getattr(method, "weights", None)
    if weights is None:
        raise ConfigError(
            f"{method.name} has no weights of its own yet; train it on a patched model and save "
            "that with vlmcompress.hub.save(handle, folder)."
        )
    try:
        with safe_open(str(weights), "pt"):
            return Path(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{weights} holds no weights that can be shared ({error}); give a {SAFE} file."
        ) from error


def _state(handle: Handle) -> State:
    """Of a handle whose patch is on.

    Raises:
        VLMCompressError: for one that was removed.
    """
    state = state_of(handle_of(handle.model).model)
    assert state is not None  # `handle_of` has seen to it
    return state


def refuse_lora_in(folder: Path, what: str) -> None:
    """Refuse to leave LoRA of something else beside a configuration.

    Args:
        folder: that is to be written.
        what: is to stand there, for the message.

    Raises:
        ConfigError: naming the file.
    """
    for name in (PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE):
        if (folder / name).exists():
            raise ConfigError(
                f"{folder} holds {name}, which would be loaded with {what}. Name another folder, "
                "or delete it there."
            )


def _read_results(results: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Results from wherever they are, seen to be some."""
    if isinstance(results, str | Path):
        results = read_json(Path(results), "results file")
    evaluations(results)
    return results


def _write_results(path: Path, results: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(results, indent=2, allow_nan=False)
        path.write_text(f"{text}\n", encoding="utf-8")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The results are not JSON ({error}); give plain values.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}).") from error


def save_config(config: CompressionConfig, folder: Path) -> None:
    """Write the configuration, last of all: a folder without it is no adapter.

    Raises:
        CheckpointError: when it cannot be written.
    """
    try:
        config.save(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}).") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made ({error}); name a folder that can be written."
        ) from error
