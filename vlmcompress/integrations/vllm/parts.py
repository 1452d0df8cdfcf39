"""What a compressed model shares with every other: processing with short placeholders."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.utils import WeightsMapper

from vlmcompress.core.errors import ConfigError
from vlmcompress.integrations.vllm.evidence import TowerReader
from vlmcompress.integrations.vllm.registry import serving_of
from vlmcompress.integrations.vllm.serving import Serving, layers_of
from vlmcompress.integrations.vllm.settings import KEY

#: transformers saves towers without the module around them that the engine has.
TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."
    }
)


class HashedProcessor:
    """Keeps what was compressed differently apart in every cache of the engine."""

    info: Any

    def _get_mm_hashes(self, inputs: Any) -> Any:
        serving = serving_of(self.info.ctx.model_config)
        if serving is not None:
            told = {**inputs.hf_processor_mm_kwargs, KEY: serving.fingerprint}
            inputs = replace(inputs, hf_processor_mm_kwargs=told)
        return super()._get_mm_hashes(inputs)  # type: ignore[misc]


def served_by(vllm_config: Any) -> Serving | None:
    """What a model is served with.

    Raises:
        ConfigError: where the engine would run the tower as a recorded graph, past the selection.
    """
    serving = serving_of(vllm_config.model_config)
    if serving is not None and getattr(
        vllm_config.compilation_config, "cudagraph_mm_encoder", False
    ):
        raise ConfigError(
            "cudagraph_mm_encoder runs the vision tower as a recorded graph, past which nothing is "
            "compressed; leave it off in --compilation-config."
        )
    return serving


def reader(serving: Serving, tower: nn.Module) -> TowerReader | None:
    """What reads a tower's attention; None where the method does not look at it."""
    if not serving.resolved.all():
        return None
    layers = layers_of(tower)
    return TowerReader(serving, layers, partial(_gathered, split=_is_split(layers)))


def _is_split(layers: nn.ModuleList) -> bool:
    return getattr(layers[0].self_attn, "tp_size", 1) > 1


def _gathered(heads: Tensor, *, split: bool) -> Tensor:
    return tensor_model_parallel_all_gather(heads.contiguous(), dim=1) if split else heads
