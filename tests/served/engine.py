"""What stands in for an engine: a registry, a model's configuration, a tower with fused heads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny


class Registry:
    """An engine's registry of classes."""

    def __init__(self) -> None:
        self.registered: dict[str, str] = {}

    def register_model(self, name: str, model: str) -> None:
        self.registered[name] = model

    def inspect_model_cls(self, architectures: Any, model_config: Any) -> str:
        return "inspected"

    def resolve_model_cls(self, architectures: Any, model_config: Any) -> str:
        return "resolved"


def model_config(config: Any, told: Any = None, model: str = "nowhere") -> SimpleNamespace:
    """An engine's configuration of a model, with what `--hf-overrides` would set."""
    if told is not None:
        config.vlmcompress = told
    return SimpleNamespace(hf_config=config, model=model, model_impl="auto")


class _Attention(nn.Module):
    """Takes q, k and v ([b, n, heads * head_size]), as attention inside an engine does."""

    def __init__(self, head_size: int, scale: float) -> None:
        super().__init__()
        self.head_size, self.scale = head_size, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v


class Tower(nn.Module):
    """An engine's tower around the weights of transformers', built up to the layer that is read."""

    def __init__(self, tower: Any, layers: int) -> None:
        super().__init__()
        self.theirs = tower
        self.vision_model = nn.Module()
        self.vision_model.encoder = nn.Module()
        blocks = []
        for layer in tower.encoder.layers[:layers]:
            block = nn.Module()
            block.self_attn = nn.Module()
            theirs = layer.self_attn
            block.self_attn.attn = _Attention(theirs.head_dim, theirs.scale)
            blocks.append(block)
        self.vision_model.encoder.layers = nn.ModuleList(blocks)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """States that the connector reads ([b, 1 + n, d]), every attention called on the way."""
        hidden = self.theirs.pre_layrnorm(self.theirs.embeddings(pixels))
        blocks = self.vision_model.encoder.layers
        for block, layer in zip(blocks, self.theirs.encoder.layers, strict=False):
            normed, theirs = layer.layer_norm1(hidden), layer.self_attn
            block.self_attn.attn(theirs.q_proj(normed), theirs.k_proj(normed), normed)
            hidden = layer(hidden, None)
        return hidden


def images(family: str, count: int = 3, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny model and what its processor makes of some images."""
    model = tiny.build(family)
    return model, tiny.inputs(model, [tiny.Prompt(images=count, text=4)], **options)
