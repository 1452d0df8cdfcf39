"""Floating-point operations of one prefill, by formula.

A multiply-add counts as two, attention counts in full (not halved for causality), and what is no
matrix product (norms, activations, softmax, sorting) counts as nothing: the convention of
`torch.utils.flop_counter.FlopCounterMode`, which misses attention under fused kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from vlmcompress.core.costs import layered_flops, prefill_flops
from vlmcompress.core.errors import UnsupportedModelError


@dataclass(frozen=True)
class Flops:
    """Operations of each stage of one prefill."""

    tower: int
    connector: int
    prefill: int

    @property
    def total(self) -> int:
        """All stages together."""
        return self.tower + self.connector + self.prefill

    def to_dict(self) -> dict[str, int]:
        """JSON-ready, with the total."""
        return {**asdict(self), "total": self.total}


def tower(config: PreTrainedConfig, images: int = 1, layers: int | None = None) -> int:
    """Operations of a CLIP-like tower.

    Args:
        config: its vision configuration.
        images: how many of them.
        layers: layers that run; all when not given.
    """
    width, depth = config.hidden_size, config.num_hidden_layers if layers is None else layers
    patches = (config.image_size // config.patch_size) ** 2
    rows = patches + 1
    embed = 2 * patches * 3 * config.patch_size**2 * width
    projections = 4 * 2 * rows * width**2
    attention = 2 * 2 * rows**2 * width
    mlp = 2 * 2 * rows * width * config.intermediate_size
    return images * (embed + depth * (projections + attention + mlp))


def connector(config: PreTrainedConfig, tokens: int) -> int:
    """Operations of LLaVA's two-layer projector on `tokens` rows."""
    layer = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layer, int) else len(layer))
    out = config.text_config.hidden_size
    return 2 * tokens * out * (width + out)


def prefill(
    config: Any,
    *,
    images: int,
    connector_tokens: int,
    prompt_tokens: int,
    tower_layers: int | None = None,
    layers: Sequence[tuple[int, int]] = (),
) -> Flops:
    """Operations of one prefill of a LLaVA, the logits of the last position included.

    What a method computes on top (attention rows, scores, sorting) is not counted.

    Args:
        config: the model's configuration.
        images: images that the tower sees.
        connector_tokens: rows that the connector sees, over all images.
        prompt_tokens: rows that the language model sees.
        tower_layers: layers that the tower runs; all when not given.
        layers: rows in attention and MLP of each layer of the language model, where they differ.
    """
    text = config.text_config
    decoder = layered_flops(text, layers) if layers else prefill_flops(text, prompt_tokens)
    if decoder is None:
        raise UnsupportedModelError(
            f"No formula for a {config.text_config.model_type!r} language model; dense Llama-like "
            "stacks are known."
        )
    return Flops(
        tower(config.vision_config, images, tower_layers),
        connector(config, connector_tokens),
        decoder,
    )
