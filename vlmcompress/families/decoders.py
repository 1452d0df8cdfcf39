"""Facts about language models: where their layers are, and what lies between attention and MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmcompress.core.errors import UnsupportedModelError

#: Norms that read the rows between a layer's attention and its MLP, the surest name first: where
#: both exist, the second one is applied to what the attention adds.
_NORMS_BETWEEN = ("pre_feedforward_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Decoder:
    """A stack of decoder layers with attention in each.

    Attributes:
        module: the text model; its output has `last_hidden_state`.
        layers: its layers.
        config: its configuration.
        attention: name of the attention in a layer.
        mlp: name of the MLP.
        first_norm: name of the norm before the attention.
        between: name of the norm before the MLP; None where both read the same rows.
    """

    module: nn.Module
    layers: nn.ModuleList
    config: Any
    attention: str = "self_attn"
    mlp: str = "mlp"
    first_norm: str = "input_layernorm"
    between: str | None = None

    @property
    def window(self) -> int | None:
        """Length of the sliding window that some layers attend in, None where none does."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and not any("sliding" in kind for kind in kinds):
            return None
        if getattr(self.config, "use_sliding_window", True) is False:
            return None
        window = getattr(self.config, "sliding_window", None)
        return window if isinstance(window, int) else None


def decoder_of(model: Any) -> Decoder:
    """The language model of a vision-language model.

    Raises:
        UnsupportedModelError: for stacks whose layers cannot be found, or have no attention.
    """
    module = model.get_decoder()
    layers = getattr(module, "layers", None)
    name = type(module).__name__
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"The decoder layers of {name} cannot be found (it has no `layers`); use a method "
            "between tower and LLM."
        )
    without = [i for i, layer in enumerate(layers) if not hasattr(layer, "self_attn")]
    if without:
        raise UnsupportedModelError(
            f"Layers {without} of {name} have no attention (convolution or state space), whose "
            "states cannot be shortened layer by layer; use a method between tower and LLM."
        )
    between = next((n for n in _NORMS_BETWEEN if hasattr(layers[0], n)), None)
    return Decoder(module, layers, module.config, between=between)
