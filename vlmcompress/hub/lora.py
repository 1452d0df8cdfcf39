"""LoRA of a model, through peft: put in, read out, taken off, folded into the weights.

Only what trains low-rank updates, or whole modules beside the model's own, is let in. Other kinds
of adapters change the model's weights or its structure as they are put in, which could not be
undone, or import modules by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmcompress.core.errors import CheckpointError, ConfigError, UnsupportedModelError
from vlmcompress.core.extras import require
from vlmcompress.hub.folder import PEFT_CONFIG, PEFT_WEIGHTS, read_json

_PREFIX = "base_model.model."
_NAME = "default"
#: Where transformers notes how the files it loaded last name weights. Those of an adapter would be
#: taken for the model's own when that is saved after a merge.
_CONVERSIONS = "_weight_conversions"

#: Options of peft's LoraConfig that say which modules learn, how much, and how it is scaled.
_ALLOWED = frozenset(
    {
        *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout"),
        *("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "modules_to_save"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    }
)
#: Those that say nothing about what is loaded.
_IGNORED = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode"),
    }
)
#: Ways to draw initial values that leave the model's own weights as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def has_lora(model: nn.Module) -> bool:
    """Whether peft has put an adapter into a model."""
    return bool(getattr(model, "peft_config", None))


def read_lora(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and tensors of the LoRA in a folder.

    Raises:
        ConfigError: for a configuration that is none of LoRA, or asks for more than that.
        CheckpointError: for weights that are no safetensors file or hold NaN.
        MissingExtraError: without peft.
    """
    peft = require("peft")
    path = folder / PEFT_CONFIG
    data = read_json(path, "configuration of peft")
    if data.get("peft_type") != "LORA":
        raise ConfigError(
            f"{path} has peft_type {data.get('peft_type')!r}; only 'LORA' is loaded. Load others "
            "with peft, then patch the model."
        )
    _refuse_more(path, data, peft.LoraConfig().to_dict())
    try:
        chosen = {name: data[name] for name in _ALLOWED & set(data)}
        config = peft.LoraConfig(**chosen, inference_mode=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no configuration of LoRA ({error}).") from error
    return config, _tensors(folder / PEFT_WEIGHTS)


def put(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """Put LoRA into a transformers model; when it does not fit, the model is as it was.

    Args:
        model: without any.
        config: of peft.
        tensors: by the names that peft gives them.

    Returns:
        What makes the model as it was.

    Raises:
        ConfigError: when the model has LoRA already, or no modules of those names.
        CheckpointError: when weights are missing, left over, or of other sizes.
    """
    if has_lora(model):
        raise ConfigError(
            f"This {type(model).__name__} carries LoRA already "
            f"({', '.join(map(repr, model.peft_config))}); take it off with "
            "vlmcompress.hub.unload(model), or fold it in with vlmcompress.hub.merge(model)."
        )
    undo, conversions = _remembered(model), model.__dict__.get(_CONVERSIONS)
    try:
        found = model.load_adapter(
            adapter_name=_NAME, peft_config=config, adapter_state_dict=dict(tensors)
        )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        undo()
        _set(model, _CONVERSIONS, conversions)
        kind = ConfigError if "arget modules" in str(error) else CheckpointError
        raise kind(f"LoRA was made for another model than this {_named(model)}: {error}") from error
    _set(model, _CONVERSIONS, conversions)
    wrong = sorted({*found.missing_keys, *found.unexpected_keys, *map(str, found.mismatched_keys)})
    if wrong:
        undo()
        raise CheckpointError(
            f"LoRA was made for another model than this {_named(model)}: {len(wrong)} weights are "
            f"missing or left over, among them {', '.join(wrong[:3])}."
        )
    return undo


def save(model: Any, folder: Path, base_model: str | None) -> None:
    """Write a model's LoRA as peft does, without the place of the model on this machine.

    Raises:
        ConfigError: when the model carries several.
        CheckpointError: when it cannot be written.
    """
    tensors = {f"{_PREFIX}{k}": v.detach().cpu().contiguous() for k, v in _state(model).items()}
    config = copy.deepcopy(model.peft_config[only_name(model)])
    config.base_model_name_or_path, config.inference_mode = base_model or "", True
    try:
        save_file(tensors, str(folder / PEFT_WEIGHTS), metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"LoRA cannot be written to {folder} ({error}).") from error


def only_name(model: Any) -> str:
    """What peft calls the model's one adapter.

    Raises:
        ConfigError: when there are several, or it is no LoRA.
    """
    names = list(model.peft_config)
    if len(names) > 1:
        raise ConfigError(
            f"This {type(model).__name__} carries {len(names)} adapters "
            f"({', '.join(map(repr, names))}); delete those that are not meant with "
            "model.delete_adapter(name)."
        )
    kind = getattr(model.peft_config[names[0]].peft_type, "value", None)
    if kind != "LORA":
        raise ConfigError(f"Adapter {names[0]!r} is {kind!r}; only 'LORA' is supported.")
    return str(names[0])


def take_off(model: Any) -> None:
    """The model without its LoRA; its own weights are those that came in."""
    for name, module in list(_adapted(model)):
        own = module.original_module if hasattr(module, "original_module") else None
        model.set_submodule(name, module.get_base_layer() if own is None else own)
    _forget(model)


def check_mergeable(model: Any) -> None:
    """Refuse what `fold` cannot do, before anything is changed.

    Raises:
        ConfigError: when there is not one LoRA.
        UnsupportedModelError: for quantised weights, which would be rounded once more.
        CheckpointError: for LoRA that holds NaN or infinity.
    """
    if not has_lora(model):
        raise ConfigError(
            f"This {type(model).__name__} carries no LoRA to merge; save it as it is, or load an "
            "adapter with LoRA first."
        )
    if getattr(model, "is_quantized", False):
        raise UnsupportedModelError(
            f"The weights of this {type(model).__name__} are quantised and would be rounded once "
            "more; load the model in bfloat16, put the adapter in and merge that."
        )
    spoilt = [name for name, tensor in _state(model).items() if not _finite(tensor)]
    if spoilt:
        raise CheckpointError(f"LoRA holds NaN or infinity in {spoilt[0]}; train it again.")


def fold(model: Any) -> None:
    """The model with its LoRA in its own weights; `check_mergeable` comes first."""
    tuners = require("peft.tuners.tuners_utils")
    for name, module in list(_adapted(model)):
        with tuners.onload_layer(module):
            model.set_submodule(name, _merged(module))
    _forget(model)


def _merged(module: Any) -> nn.Module:
    if hasattr(module, "original_module"):
        own: nn.Module = module.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    else:
        module.merge()
        own = module.get_base_layer()
    return own


def _state(model: Any) -> dict[str, Tensor]:
    """What the model's one adapter has learnt."""
    # Whether embeddings were resized would be asked of the Hub.
    found: dict[str, Tensor] = require("peft").get_peft_model_state_dict(
        model, adapter_name=only_name(model), save_embedding_layers=False
    )
    return found


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that peft put in the place of others, outermost ones alone."""
    kinds = (
        require("peft.tuners.tuners_utils").BaseTunerLayer,
        require("peft.utils.other").AuxiliaryTrainingWrapper,
    )
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, kinds):
            inside.append(name)
            yield name, module


def _forget(model: Any) -> None:
    """Take off what peft and transformers note on a model with adapters."""
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)


def _set(model: Any, name: str, value: Any) -> None:
    """An attribute as it was found: None where there was none."""
    if value is None:
        model.__dict__.pop(name, None)
    else:
        model.__dict__[name] = value


def _remembered(model: nn.Module) -> Callable[[], None]:
    """A function that takes LoRA off again, with what learned and which mode it was in before."""
    learned = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}

    def undo() -> None:
        take_off(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learned[name])
        for name, module in model.named_modules():
            module.training = modes[name]

    return undo


def _refuse_more(path: Path, data: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Refuse a configuration that is more than LoRA of a model's modules.

    Raises:
        ConfigError: naming the options.
    """
    more = [
        f"{name}={value!r}"
        for name, value in sorted(data.items())
        if name not in _ALLOWED | _IGNORED | {"init_lora_weights"}
        and value
        and value != plain.get(name)
    ]
    start = data.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        more.append(f"init_lora_weights={start!r}")
    if more:
        raise ConfigError(
            f"{path} asks for {', '.join(more)}, which changes more of a model than can be taken "
            "back; load it with peft, then patch the model."
        )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(str(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no usable weights ({error}); give a file that peft wrote."
        ) from error
    spoilt = [k for k, v in tensors.items() if v.is_floating_point() and not _finite(v)]
    if spoilt:
        raise CheckpointError(f"{path} holds NaN or infinity in {spoilt[0]}; train it again.")
    return tensors


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _named(model: Any) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
