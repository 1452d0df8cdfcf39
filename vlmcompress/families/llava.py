"""LLaVA 1.5: CLIP (or SigLIP, or Pixtral) tower, MLP connector, Llama-like LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmcompress.families.base import Family, Grid
from vlmcompress.families.towers import last_hidden_state_read


@dataclass(frozen=True)
class Llava(Family):
    """Reads the hidden states `vision_feature_layer` names; the connector is an MLP per patch."""

    connector_path: str | None = "multi_modal_projector"
    layer_names: tuple[str, ...] = ("vision_feature_layer",)

    def connector(self, base: nn.Module) -> nn.Module | None:
        """None for Pixtral towers, whose ragged images are split by size after it."""
        config: Any = base.config
        if self.connector_path is None or config.vision_config.model_type == "pixtral":
            return None
        return base.get_submodule(self.connector_path)

    def last_read_layer(self, base: nn.Module, call: Mapping[str, Any], depth: int) -> int:
        """From `vision_feature_layer` of the call or the config."""
        return max(self.read_layers(base, call, depth))

    def read_layers(self, base: nn.Module, call: Mapping[str, Any], depth: int) -> tuple[int, ...]:
        """Likewise; a list of layers is read side by side."""
        config: Any = base.config
        given = [call[name] for name in self.layer_names if call.get(name) is not None]
        known = [vars(config)[name] for name in self.layer_names if name in vars(config)]
        wanted = (given or known)[0]
        layers = [wanted] if isinstance(wanted, int) else list(wanted)
        return tuple(last_hidden_state_read(layer, depth) for layer in layers)

    def grids(self, base: nn.Module, call: Mapping[str, Any], lengths: Sequence[int]) -> list[Grid]:
        """Square, or from `image_sizes` for Pixtral towers."""
        sizes = call.get("image_sizes")
        if sizes is None:
            return super().grids(base, call, lengths)
        config: Any = base.config
        patch = config.vision_config.patch_size
        return [(h // patch, w // patch) for h, w in torch.as_tensor(sizes).tolist()]


FAMILY = Llava("llava")
