"""Adapters put into models and taken off."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlmcompress.core.config import StageConfig
from vlmcompress.core.errors import AlreadyPatchedError, ConfigError
from vlmcompress.hub import lora
from vlmcompress.hub.fetching import locate
from vlmcompress.hub.folder import Adapter, read
from vlmcompress.live.install import outer_model
from vlmcompress.live.patch import handle_of, patch
from vlmcompress.live.state import state_of
from vlmcompress.methods import registry

if TYPE_CHECKING:
    from vlmcompress.live.handle import Handle

Kind = TypeVar("Kind")


def load(
    model: Any,
    adapter: str | Path,
    *,
    force: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Handle:
    """Patch a model as an adapter says.

    Only JSON and safetensors are read: nothing that an adapter holds is run.

    Args:
        model: what the adapter was trained for, unpatched. LoRA weights, where the adapter holds
            some, are put into it and stay when the patch is removed; `unload` takes them off.
        adapter: a folder with `vlmcompress_config.json`, the files that it names, and perhaps
            PEFT's; or a Hub id (`"user/name"`) where there is no such folder.
        force: also for budgets (`keep=`) that the adapter was not trained for.
        revision: of the repository on the Hub.
        token: for the Hub, as `huggingface_hub` takes it.
        endpoint: of the Hub, where it is not the public one.
        cache_dir: for what is downloaded.
        options: further arguments of `patch`, such as `keep`, `processor` and `clip`.

    Returns:
        The handle.

    Raises:
        ConfigError, ConfigTypeError: for what is no adapter, a newer one, one made for another
            model, and a budget that it was not trained for.
        UnknownMethodError: for a method that this vlmcompress does not have.
        CheckpointError: for weights that cannot be used.
        AlreadyPatchedError: for a patched model.
        MissingExtraError: for LoRA without peft. As after all of these, the model is as it was.
    """
    model = outer_model(model)
    if state_of(model) is not None:
        raise AlreadyPatchedError(
            f"This {type(model).__name__} is patched already; call handle.remove() on its handle, "
            "then load the adapter."
        )
    hub = {"revision": revision, "token": token, "endpoint": endpoint, "cache_dir": cache_dir}
    found = read(locate(adapter, **hub))
    if not found.lora:
        return patch(model, found.located, force=force, **options)
    undo = lora.put(model, *lora.read_lora(found.folder))
    try:
        return patch(model, found.located, force=force, **options)
    except BaseException:
        undo()
        raise


def unload(model: Any) -> Any:
    """Take the LoRA of an adapter off a model, and the patch with it.

    Args:
        model: with or without a patch, and with or without LoRA.

    Returns:
        The transformers model, its weights bit for bit those that it had before.
    """
    model = outer_model(model)
    if state_of(model) is not None:
        handle_of(model).remove()
    if lora.has_lora(model):
        lora.take_off(model)
    return model


def learned(adapter: str | Path, kind: type[Kind], **hub: Any) -> Kind:
    """A method with trained weights, to be given to `patch`.

    Args:
        adapter: a folder or a Hub id, as for `load`, with one method and no LoRA.
        kind: what it must be, such as `LearnedCompressor`.
        hub: `revision`, `token`, `endpoint` and `cache_dir` of `huggingface_hub`.

    Returns:
        The method with its options and its weights; `tokens` are those it was trained to leave,
        where its configuration gives a count. With a share, give `patch` a `keep`.

    Raises:
        ConfigError: for any other adapter.
        CheckpointError: for weights that are no safetensors.
    """
    found = read(locate(adapter, **hub))
    stage, known = _only_stage(found, kind)
    options = dict(stage.options)
    if isinstance(stage.keep, int) and options.get("tokens") is None and "tokens" in known:
        options["tokens"] = stage.keep
    made = registry.create(stage.method, **options)
    assert isinstance(made, kind)  # `_only_stage` has seen to it
    return made


def _only_stage(found: Adapter, kind: type) -> tuple[StageConfig, set[str]]:
    """The one method of an adapter, and the options that it knows.

    Raises:
        ConfigError: when there is more, or it is of another kind.
    """
    if found.lora or len(found.config.stages) != 1:
        more = "LoRA of the model" if found.lora else f"{len(found.config.stages)} methods"
        raise ConfigError(
            f"{found.folder} holds {more}, which no single method can bring; use "
            "vlmcompress.hub.load(model, folder)."
        )
    stage = found.located.stages[0]
    method: Any = registry.get(stage.method)
    if not issubclass(method, kind):
        raise ConfigError(
            f"{found.folder} holds {stage.method!r}, which is no {kind.__name__}; use "
            "vlmcompress.hub.load(model, folder)."
        )
    return stage, {field.name for field in dataclasses.fields(method)}
