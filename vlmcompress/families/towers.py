"""Facts about vision towers: where their layers are and how q and k come about.

A tower's own attention kernel is never touched. Evidence needs q and k only, and every tower makes
them in projections whose outputs can be read; what happens to them after that (split into heads,
rotary embedding) is told here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: Under this name `Tower.queries_keys` finds what the attention was given.
INPUT = "input"


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
        output: name of the projection behind the attention, where that can be made outside of it.
        registers: rows between [CLS] and the patches that are no patches; they are never reduced.
        batch_first: whether a block's rows are [b, n, d], and not [n, b, d].
    """

    layers_path: str = "encoder.layers"
    attention: str = "self_attn"
    has_cls: bool = False
    norm: str | None = "layer_norm2"
    first_norm: str = "layer_norm1"
    mlp: str = "mlp"
    values: str = "v_proj"
    output: str = "out_proj"
    registers: int = 0
    batch_first: bool = True

    #: projections whose outputs are read
    projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj")
    #: argument of the attention that is added to its logits
    mask: ClassVar[str] = "attention_mask"

    def layers(self, tower: nn.Module) -> nn.ModuleList:
        """The tower's blocks."""
        module = tower.get_submodule(self.layers_path)
        # A fact about the architecture, not user input.
        assert isinstance(module, nn.ModuleList | nn.Sequential)
        return module if isinstance(module, nn.ModuleList) else nn.ModuleList(module)

    def rows(self, x: Tensor) -> Tensor:
        """[b, n, d] of what a block is given, and the way back."""
        return x if self.batch_first else x.transpose(0, 1)

    def queries_keys(
        self, attention: nn.Module, outputs: Mapping[str, Tensor], kwargs: Mapping[str, Any]
    ) -> QueriesKeys:
        """Heads from projection outputs ([b, n, heads * head_dim])."""
        q, k = (self.heads(outputs[name], attention) for name in self.projections)
        return QueriesKeys(q, k, _scale(attention))

    def projected(self, attention: nn.Module, given: Tensor) -> dict[str, Tensor]:
        """What `queries_keys` reads of an attention that is about to run."""
        return {name: attention.get_submodule(name)(given) for name in self.projections}

    def value_heads(self, attention: nn.Module, outputs: Mapping[str, Tensor]) -> Tensor:
        """[b, heads, n, head_dim] values from the same outputs and that of `values`."""
        return self.heads(outputs[self.values], attention)

    @staticmethod
    def heads(x: Tensor, attention: nn.Module) -> Tensor:
        """[b, n, heads * head_dim] as [b, heads, n, head_dim]."""
        return x.unflatten(-1, (-1, int(attention.head_dim))).transpose(1, 2)  # type: ignore[arg-type]

    def weighed(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], bias: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of an attention call with a bias on the logits of keys.

        Args:
            args: what the block gives; a mask among it is for rows that are there no more.
            kwargs: likewise.
            bias: [b, n] in the dtype of the rows; None for none.
        """
        others = {name: value for name, value in kwargs.items() if name != self.mask}
        if bias is None:
            return tuple(args[:1]), others
        n = bias.shape[1]  # the mask takes no memory of its own
        return tuple(args[:1]), {**others, self.mask: bias[:, None, None].expand(-1, 1, n, n)}


@dataclass(frozen=True)
class FusedTower(Tower):
    """A tower with one projection to q, k and v, which it may normalise: the ViTs of timm."""

    layers_path: str = "blocks"
    attention: str = "attn"
    norm: str | None = "norm2"
    first_norm: str = "norm1"
    values: str = "qkv"

    projections: ClassVar[tuple[str, ...]] = ("qkv",)
    mask: ClassVar[str] = "attn_mask"

    def queries_keys(
        self, attention: nn.Module, outputs: Mapping[str, Tensor], kwargs: Mapping[str, Any]
    ) -> QueriesKeys:
        """Normalised heads from the projection's output ([b, n, 3 * heads * head_dim])."""
        q, k, _ = _thirds(outputs["qkv"], attention)
        q, k = attention.q_norm(q), attention.k_norm(k)  # type: ignore[operator]
        return QueriesKeys(q, k, _scale(attention))

    def value_heads(self, attention: nn.Module, outputs: Mapping[str, Tensor]) -> Tensor:
        """The last third."""
        return _thirds(outputs["qkv"], attention)[2]


@dataclass(frozen=True)
class InnerTower(Tower):
    """A tower whose attention keeps its projections to itself: the ViTs of open_clip.

    q and k are made a second time from what the attention is given, since nothing outside of
    `torch.nn.MultiheadAttention` sees them.

    Attributes:
        own: whether the attention is open_clip's own and not torch's.
    """

    layers_path: str = "transformer.resblocks"
    attention: str = "attn"
    norm: str | None = "ln_2"
    first_norm: str = "ln_1"
    values: str = INPUT
    own: bool = False

    projections: ClassVar[tuple[str, ...]] = ()
    mask: ClassVar[str] = "attn_mask"

    def projected(self, attention: nn.Module, given: Tensor) -> dict[str, Tensor]:
        """What it is given."""
        return {INPUT: given}

    def queries_keys(
        self, attention: nn.Module, outputs: Mapping[str, Tensor], kwargs: Mapping[str, Any]
    ) -> QueriesKeys:
        """Heads of what the attention was given ([b, n, d], or [n, b, d])."""
        q, k = (self._part(attention, outputs[INPUT], i) for i in (0, 1))
        if self.own:
            q, k = attention.ln_q(q), attention.ln_k(k)  # type: ignore[operator]
        return QueriesKeys(q, k, q.shape[-1] ** -0.5)

    def value_heads(self, attention: nn.Module, outputs: Mapping[str, Tensor]) -> Tensor:
        """The last third of the projection."""
        return self._part(attention, outputs[INPUT], 2)

    def weighed(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], bias: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Torch's attention takes the bias of keys as it is."""
        if self.own:
            return super().weighed(args, kwargs, bias)
        return tuple(args), {**kwargs, "key_padding_mask": bias}

    def _part(self, attention: nn.Module, given: Tensor, i: int) -> Tensor:
        """[b, heads, n, head_dim] of queries (0), keys (1) or values (2)."""
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        width = given.shape[-1]
        part = slice(i * width, (i + 1) * width)
        x = linear(self.rows(given), weight[part], None if bias is None else bias[part])  # type: ignore[index]
        return x.unflatten(-1, (int(attention.num_heads), -1)).transpose(1, 2)  # type: ignore[arg-type]


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


def _thirds(qkv: Tensor, attention: nn.Module) -> tuple[Tensor, ...]:
    """[b, heads, n, head_dim] of queries, keys and values."""
    heads = int(attention.num_heads)  # type: ignore[arg-type]
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


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
