"""Training in shards: FSDP2, as `accelerate launch` with `examples/fsdp2.yaml` asks for.

Every process holds a share of each weight. Layers are put together for the moment in which they
run; what is learnt is put together for checkpoints and at the end.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from torch import nn

from vlmcompress.core.errors import ConfigError

_EXAMPLE = "examples/fsdp2.yaml is a configuration that works"


def prepare(loop: Any) -> bool:
    """Say how a training is sharded, if it is to be.

    Args:
        loop: a `Loop` before its first step.

    Returns:
        Whether it is.

    Raises:
        ConfigError: where shards were asked for and cannot be, or not in this way.
    """
    if not loop.is_fsdp_enabled:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ConfigError(
                "FSDP is asked for, and accelerate shards on GPUs and other accelerators only; "
                "every process would hold the whole model here. Launch with --multi_gpu instead."
            )
        return False
    plugin = loop.accelerator.state.fsdp_plugin
    kind = plugin.state_dict_type.name if plugin.state_dict_type else None
    allowed = {
        "fsdp_version": (plugin.fsdp_version, 2),
        "fsdp_state_dict_type": (kind, "FULL_STATE_DICT"),
        "fsdp_cpu_ram_efficient_loading": (bool(plugin.cpu_ram_efficient_loading), False),
    }
    wrong = [f"{n} is {has!r}, not {want!r}" for n, (has, want) in allowed.items() if has != want]
    if getattr(loop.model.model, "is_quantized", False):
        wrong.append("the language model is in 4 bits, which is sharded by no test")
    if wrong:
        raise ConfigError(f"FSDP cannot train this: {'; '.join(wrong)}. {_EXAMPLE}.")
    loop.model._no_split_modules = _blocks(loop.model.model.get_base_model())
    return True


def gather(loop: Any) -> None:
    """What was learnt, whole in the first process, in place of its shards. All processes call it.

    The model runs no more after that: the rest of it stays in shards.
    """
    whole = loop.accelerator.get_state_dict(loop.model)
    for name, value in whole.items():
        owner, _, leaf = name.rpartition(".")
        loop.model.get_submodule(owner).register_parameter(leaf, nn.Parameter(value))


def _blocks(model: Any) -> list[str]:
    """Classes of a transformers model's repeated blocks, each of which is put together at once."""
    found = Counter(type(module).__name__ for module in model.modules())
    return sorted(name for name in model._no_split_modules or () if found[name] > 1)
