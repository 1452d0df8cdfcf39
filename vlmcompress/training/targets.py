"""Which modules of a vision-language model LoRA is put on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn

from vlmcompress.core.errors import ConfigError, UnsupportedModelError
from vlmcompress.families.connectors import connector_name

Connector = Literal["none", "lora", "full"]
#: Names that stand for several modules of a decoder layer.
GROUPS = ("all", "attention", "mlp")
_ATTENTION = ("self_attn.", "linear_attn.", "attn.")


def decoder_name(model: Any) -> str:
    """Full name of the text model inside a vision-language model.

    Raises:
        UnsupportedModelError: when it has no stack of layers.
    """
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UnsupportedModelError(
            f"The decoder layers of {type(model).__name__} cannot be found; LoRA is put on "
            "linear maps of those."
        )
    return next(name for name, module in model.named_modules() if module is decoder)


def lora_targets(model: Any, targets: str = "all", connector: str = "none") -> str:
    """A regular expression for peft's `target_modules`: full names, tower spared.

    Args:
        model: the outer model.
        targets: `all`, `attention`, `mlp`, or names of linear maps separated by commas
            (`q_proj,v_proj`).
        connector: `lora` adds the linear maps of the connector.

    Raises:
        ConfigError: for a name that no linear map of a decoder layer has.
        UnsupportedModelError: when decoder or connector cannot be found.
    """
    layers = f"{decoder_name(model)}.layers."
    inside = _linear_within(model, layers)
    known = sorted({name.split(".", 1)[1] for name in inside})
    chosen = _chosen(known, targets)
    pattern = rf"{re.escape(layers)}\d+\.(?:{_either(chosen)})"
    if connector != "lora":
        return pattern
    name = connector_name(model)
    maps = sorted(_linear_within(model, f"{name}."))
    if not maps and not isinstance(model.get_submodule(name), nn.Linear):
        raise ConfigError(
            f"The connector {name} of this model holds no linear map for LoRA; use "
            "connector='full'."
        )
    inner = rf"\.(?:{_either(maps)})" if maps else ""
    return f"(?:{pattern})|(?:{re.escape(name)}{inner})"


def check_connector(value: str) -> None:
    """Check how the connector is trained.

    Raises:
        ConfigError: for anything but `none`, `lora` and `full`.
    """
    if value not in get_args(Connector):
        allowed = ", ".join(map(repr, get_args(Connector)))
        raise ConfigError(f"connector is {value!r}; allowed are {allowed}.")


def outside_decoder(model: Any) -> list[str]:
    """Names of the modules that together are everything but the language model's layers.

    They keep their precision when weights are quantised.
    """
    decoder = model.get_decoder()
    holders = {
        name
        for name, module in model.named_modules()
        if module is not decoder and any(inner is decoder for inner in module.modules())
    }
    return [
        name
        for name, module in model.named_modules()
        if name not in holders and name.rpartition(".")[0] in holders and module is not decoder
    ]


def _linear_within(model: Any, prefix: str) -> list[str]:
    """Names, behind the prefix, of the linear maps below it; quantised ones are linear, too."""
    return [
        name.removeprefix(prefix)
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear)
    ]


def _chosen(known: Sequence[str], targets: str) -> list[str]:
    if targets == "all":
        return list(known)
    if targets in GROUPS:
        attention = targets == "attention"
        return [name for name in known if name.startswith(_ATTENTION) == attention]
    wanted = [word.strip() for word in targets.split(",") if word.strip()]
    missing = [word for word in wanted if not any(_is(name, word) for name in known)]
    if missing or not wanted:
        raise ConfigError(
            f"targets is {targets!r}; allowed are {', '.join(GROUPS)} or names of linear maps in "
            f"this model's decoder layers: {', '.join(known)}."
        )
    return [name for name in known if any(_is(name, word) for word in wanted)]


def _is(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _either(names: Sequence[str]) -> str:
    return "|".join(re.escape(name) for name in names)
