"""Copies of a language model's first layers, and how they are run."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import ConfigError, UnsupportedModelError
from vlmcompress.families.decoders import Decoder, decoder_of


def first_layers(base: nn.Module, count: int) -> list[nn.Module]:
    """Copies of the language model's first layers, with nothing that was put on these.

    They run sdpa, under masks of their own.

    Args:
        base: the model without its head.
        count: layers.

    Raises:
        ConfigError: when there are not as many.
        UnsupportedModelError: for layers whose weights cannot be copied, quantised ones above all.
    """
    decoder = decoder_of(base)
    if count > len(decoder.layers):
        raise ConfigError(
            f"fusion={count} layers are to be copied, and the language model has "
            f"{len(decoder.layers)}; give that many at most."
        )
    config = copy.deepcopy(decoder.config)
    config._attn_implementation = "sdpa"
    return [_copied(layer, config, number) for number, layer in enumerate(decoder.layers[:count])]


def _copied(layer: nn.Module, config: Any, number: int) -> nn.Module:
    from transformers.initialization import no_init_weights

    kind: Any = type(layer)
    weights = _plain(layer)
    meta = any(tensor.is_meta for tensor in weights.values())
    try:
        with no_init_weights(), torch.device("meta" if meta else "cpu"):
            made: nn.Module = kind(config, number)
        if not meta:
            made.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f"Layers of this language model ({kind.__name__}) cannot be copied: {error}. Load it "
            "without quantisation, or use fusion=0."
        ) from error
    return made


def _plain(layer: nn.Module) -> dict[str, Tensor]:
    """Weights of a layer by their own names; what PEFT has put beside them is left out."""
    state = layer.state_dict()
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if "lora_" not in name
    }


def run_layer(
    decoder: Decoder, axes: int, layer: nn.Module, rows: Tensor, allowed: Tensor, places: Tensor
) -> Tensor:
    """One such layer's rows.

    Args:
        decoder: the language model it was copied from.
        axes: of its positions, 1 or 3.
        layer: the copy.
        rows: [B, L, d].
        allowed: [B, 1, L, L] bool, which rows see which.
        places: [B, L] positions.
    """
    hidden = torch.zeros(allowed.shape, dtype=rows.dtype, device=rows.device)
    hidden.masked_fill_(~allowed, torch.finfo(rows.dtype).min)
    where = places if axes == 1 else places.expand(axes, *places.shape)
    turned = decoder.module.rotary_emb(rows, position_ids=where)  # type: ignore[operator]
    out = layer(
        rows,
        attention_mask=hidden,
        position_ids=places,
        position_embeddings=turned,
        past_key_values=None,
        use_cache=False,
    )
    return out if isinstance(out, Tensor) else out[0]  # type: ignore[no-any-return]
