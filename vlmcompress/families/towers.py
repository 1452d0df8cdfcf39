"""Facts about vision towers: where their layers are and how q and k come about.

A tower's own attention kernel is never touched. Evidence needs q and k only, and every tower makes
them in projections whose outputs can be read; what happens to them after that (split into heads,
rotary embedding) is told here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class QueriesKeys:
    """Queries and keys of one attention layer, ready for `softmax(q k^T * scale)`.

    Attributes:
        q: [b, heads, n, head_dim].
        k: [b, heads, n, head_dim].
        scale: factor on the logits.
        lengths: for towers that pack several images into one row (b = 1), tokens of each image.
        bias: [b, n] added to the logits of every key; None for none.
    """

    q: Tensor
    k: Tensor
    scale: float
    lengths: tuple[int, ...] | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Tower:
    """A tower that projects q and k with separate linear layers and does not rotate them.

    Covers CLIP, SigLIP and Aimv2-like towers.

    Attributes:
        layers_path: path from the tower module to its ModuleList of blocks.
        attention: name of the attention module in a block.
        has_cls: whether row 0 is a [CLS] token.
        norm: name of the norm between a block's attention and its MLP; None for towers whose rows
            cannot be reduced between blocks.
        first_norm: name of the norm before the attention.
        mlp: name of the MLP.
        values: name of the projection to values.
    """

    layers_path: str = "encoder.layers"
    attention: str = "self_attn"
    has_cls: bool = False
    norm: str | None = "layer_norm2"
    first_norm: str = "layer_norm1"
    mlp: str = "mlp"
    values: str = "v_proj"

    #: projections whose outputs are read
    projections = ("q_proj", "k_proj")

    def layers(self, tower: nn.Module) -> nn.ModuleList:
        """The tower's blocks."""
        module = tower.get_submodule(self.layers_path)
        assert isinstance(module, nn.ModuleList)  # a fact about the architecture, not user input
        return module

    def queries_keys(
        self, attention: nn.Module, outputs: Mapping[str, Tensor], kwargs: Mapping[str, Any]
    ) -> QueriesKeys:
        """Heads from projection outputs ([b, n, heads * head_dim])."""
        q, k = (self.heads(outputs[name], attention) for name in self.projections)
        return QueriesKeys(q, k, _scale(attention))

    @staticmethod
    def heads(x: Tensor, attention: nn.Module) -> Tensor:
        """[b, n, heads * head_dim] as [b, heads, n, head_dim]."""
        return x.unflatten(-1, (-1, int(attention.head_dim))).transpose(1, 2)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PackedTower(Tower):
    """A tower that packs all images into one row of patches and rotates q and k.

    Covers the ViTs of Qwen2-VL, GLM-4V (fused qkv) and Kimi (separate projections). The rotation is
    the model's own function.
    """

    layers_path: str = "blocks"
    attention: str = "attn"
    norm: str | None = None  # its blocks are told where each image ends
    fused: bool = True

    @property
    def projections(self) -> tuple[str, ...]:  # type: ignore[override]
        """Projections whose outputs are read."""
        return ("qkv",) if self.fused else ("q_proj", "k_proj")

    def queries_keys(
        self, attention: nn.Module, outputs: Mapping[str, Tensor], kwargs: Mapping[str, Any]
    ) -> QueriesKeys:
        """Rotated heads from projection outputs ([n, ...]); `kwargs` are the attention call's."""
        if self.fused:
            qkv = outputs["qkv"]
            heads = int(attention.num_heads)  # type: ignore[arg-type]
            q, k, _ = qkv.reshape(len(qkv), 3, heads, -1).unbind(1)
            q, k = q[None], k[None]
        else:
            q, k = (
                outputs[name].unflatten(-1, (-1, attention.head_dim))[None]
                for name in self.projections
            )
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        q, k = rotate(q, k, *kwargs["position_embeddings"])
        lengths = torch.diff(kwargs["cu_seqlens"]).tolist()
        return QueriesKeys(q.transpose(1, 2), k.transpose(1, 2), _scale(attention), tuple(lengths))


def _scale(attention: nn.Module) -> float:
    scale = getattr(attention, "scale", None)
    return float(attention.scaling if scale is None else scale)  # type: ignore[arg-type]


def last_hidden_state_read(feature_layer: int | Sequence[int], depth: int) -> int:
    """Index of the last tower layer whose output is read, for `hidden_states[feature_layer]`.

    hidden_states has depth + 1 entries (0 = embeddings), so entry i is the output of layer i - 1.
    """
    layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    return max((layer % (depth + 1)) - 1 for layer in layers)


#: Towers that families choose by their vision configuration's model type.
TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(has_cls=True),
    "siglip_vision_model": Tower(),
    "siglip2_vision_model": Tower(),
}
