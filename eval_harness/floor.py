"""The two halves of the floor: the tower alone, and the prefill of a short prompt alone.

And the ideal of the prefill: each layer of the language model alone, at its own length.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval_harness.clock import Clock
from eval_harness.stages import Parts


def tower_alone(model: Any, inputs: Mapping[str, Tensor], clock: Clock) -> float:
    """Seconds of `get_image_features`: all tower layers and the connector on all patches.

    Args:
        model: unpatched, or inside `handle.disabled()`.
        inputs: of a prompt with an image.
        clock: of the model's device.
    """
    function = model.get_image_features
    names = set(inspect.signature(function).parameters) & set(inputs)
    given = {name: inputs[name] for name in names - {"input_ids", "attention_mask"}}
    with torch.no_grad():
        return clock.time(lambda: function(**given))


def prefill_alone(parts: Parts, embeddings: Tensor, clock: Clock) -> float:
    """Seconds of the language model and its head on an embedded prompt ([B, L, d])."""

    def call() -> None:
        hidden = parts.language_model(inputs_embeds=embeddings, use_cache=True)[0]
        parts.head(hidden[:, -1:])

    with torch.no_grad():
        return clock.time(call)


def has_layers(parts: Parts) -> bool:
    """Whether `layers_alone` knows the language model: layers as in Llama, all of one kind."""
    model = parts.language_model
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    named = all(hasattr(model, name) for name in ("layers", "norm", "rotary_emb"))
    return named and kinds == {"full_attention"}


def layers_alone(parts: Parts, embeddings: Tensor, lengths: Sequence[int], clock: Clock) -> float:
    """Seconds of the language model's layers, each at its own length, and of its head.

    Every layer gets the first rows of the one before, nothing is chosen, and the cache is filled.

    Args:
        parts: the model's; layers as in Llama.
        embeddings: [B, L, d] the embedded prompt.
        lengths: rows of each layer.
        clock: of the model's device.
    """
    from transformers import DynamicCache

    model: Any = parts.language_model
    cos, sin = model.rotary_emb(embeddings, position_ids=_positions(model, embeddings))

    def call() -> None:
        hidden, cache = embeddings, DynamicCache(config=model.config)
        for layer, length in zip(model.layers, lengths, strict=True):
            hidden = layer(
                hidden[:, :length],
                attention_mask=None,
                position_embeddings=(cos[..., :length, :], sin[..., :length, :]),
                past_key_values=cache,
                use_cache=True,
            )
        parts.head(model.norm(hidden)[:, -1:])

    with torch.no_grad():
        return clock.time(call)


def _positions(model: Any, embeddings: Tensor) -> Tensor:
    """[1, L], or [3, 1, L] for rotary embeddings over time, height and width."""
    where = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    rope = getattr(model.config, "rope_parameters", None) or {}
    return where.expand(3, 1, -1) if "mrope_section" in rope else where
