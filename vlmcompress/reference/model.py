"""The reference model's shape and its start: transformers' own LLaVA, small enough for a CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from .scenes import GRID, PATCH, PATCHES, SIDE
from .tokenizer import EOS, IMAGE, PAD, SPECIAL, VOCABULARY

_LOCAL_LAYERS = 3  # tower layers whose first heads start out looking at their own neighbourhood
_POSITION_AMPLITUDE = 0.7


@dataclass(frozen=True)
class Shape:
    """Sizes of the reference model; the defaults are what ships."""

    width: int = 192
    heads: int = 6
    tower_layers: int = 8
    tower_mlp: int = 576
    llm_layers: int = 8
    llm_mlp: int = 448
    kv_heads: int = 2
    text_width: int = 128
    text_layers: int = 2


def llava_config(shape: Shape) -> LlavaConfig:
    """Configuration of the vision-language model."""
    tower = CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.tower_mlp,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.heads,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=shape.text_width,
    )
    llm = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.llm_mlp,
        num_hidden_layers=shape.llm_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.width // shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=llm,
        image_token_index=SPECIAL.index(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def text_config(shape: Shape) -> CLIPTextConfig:
    """Configuration of the CLIP text head."""
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.text_width,
        intermediate_size=2 * shape.text_width,
        projection_dim=shape.text_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=4,
        max_position_embeddings=96,
        hidden_act="gelu",
        bos_token_id=None,
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
    )


def _sincos(width: int) -> Tensor:
    """Two-dimensional sine and cosine positions, ``[196, width]`` in [-1, 1]."""
    quarter = width // 4
    rates = 1.0 / 100 ** (torch.arange(quarter) / quarter)
    steps = torch.arange(GRID)[:, None] * rates
    waves = torch.cat([steps.sin(), steps.cos()], dim=1)
    rows = waves[:, None].expand(GRID, GRID, -1)
    columns = waves[None].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], dim=-1).reshape(PATCHES, -1)


@torch.no_grad()
def _start_tower(tower: Any, draw: torch.Generator) -> None:
    """Large positions, sharp attention, and a local start of the first layers.

    The usual small start (0.02) does not learn positions from scratch.
    """
    embeddings = tower.embeddings
    width = embeddings.embed_dim
    embeddings.class_embedding.normal_(0, 0.7, generator=draw)
    inputs = embeddings.patch_embedding.weight[0].numel()
    embeddings.patch_embedding.weight.normal_(0, inputs**-0.5, generator=draw)
    positions = torch.zeros(PATCHES + 1, width)
    positions[1:] = _POSITION_AMPLITUDE * _sincos(width)
    embeddings.position_embedding.weight.copy_(positions)
    for i, layer in enumerate(tower.encoder.layers):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.normal_(0, width**-0.5, generator=draw)
        if i < _LOCAL_LAYERS:
            half = width // 2
            attention.k_proj.weight[:half] = attention.q_proj.weight[:half]
        depth = (2 * len(tower.encoder.layers)) ** -0.5
        attention.v_proj.weight.normal_(0, width**-0.5, generator=draw)
        attention.out_proj.weight.normal_(0, depth * width**-0.5, generator=draw)
        layer.mlp.fc1.weight.normal_(0, width**-0.5, generator=draw)
        layer.mlp.fc2.weight.normal_(0, depth * layer.mlp.fc2.in_features**-0.5, generator=draw)


@torch.no_grad()
def _start_llm(model: Any, draw: torch.Generator) -> None:
    """Word embeddings of unit scale, so that image tokens of unit scale weigh the same."""
    llm = model.model.language_model
    depth = (2 * len(llm.layers)) ** -0.5
    llm.embed_tokens.weight.normal_(0, 1, generator=draw)
    llm.norm.weight.fill_(0.1)  # the head is tied: keeps the first logits small
    for layer in llm.layers:
        for name, weight in layer.named_parameters():
            if weight.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = weight.shape[1] ** -0.5 * (depth if last else 1.0)
                weight.normal_(0, std, generator=draw)


@torch.no_grad()
def build_model(shape: Shape | None = None, seed: int = 0) -> LlavaForConditionalGeneration:
    """Build the untrained model; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(llava_config(shape or Shape()))
    draw = torch.Generator().manual_seed(seed)
    _start_tower(model.model.vision_tower, draw)
    _start_llm(model, draw)
    projector = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.normal_(0, math.sqrt(1.5 / linear.in_features), generator=draw)
        linear.bias.zero_()
    return model


@dataclass(frozen=True)
class TowerStates:
    """What the training reads off the tower.

    Attributes:
        hidden: hidden states ``[b, 1 + m, width]`` of layers -4 to -1, keyed by layer.
        attention: head-mean attention of [CLS], ``[b, 1 + m]`` float32, for the same layers.
    """

    hidden: dict[int, Tensor]
    attention: dict[int, Tensor]


def cls_attention(layer: Any, hidden: Tensor) -> Tensor:
    """Attention of [CLS] in a tower layer, mean over heads.

    Args:
        layer: a CLIP encoder layer.
        hidden: its input ``[b, 1 + m, width]``.

    Returns:
        ``[b, 1 + m]`` float32; column 0 is [CLS] itself.
    """
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    b, n, _ = normed.shape
    q = attention.q_proj(normed[:, :1]).view(b, 1, -1, attention.head_dim).transpose(1, 2)
    k = attention.k_proj(normed).view(b, n, -1, attention.head_dim).transpose(1, 2)
    scores = (q.float() @ k.float().transpose(2, 3)) * attention.scale
    return scores.softmax(dim=-1).mean(dim=1)[:, 0]


def run_tower(tower: Any, pixels: Tensor, kept: Tensor | None) -> TowerStates:
    """Run the tower on all patches, or on some of them.

    Args:
        tower: a CLIPVisionModel.
        pixels: ``[b, 3, 224, 224]``.
        kept: ``[b, m]`` patch indices, or None for all 196.
    """
    hidden = tower.embeddings(pixels)
    if kept is not None:
        rows = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
        hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden = tower.pre_layrnorm(hidden)
    layers = tower.encoder.layers
    states = TowerStates({}, {})
    for i, layer in enumerate(layers):
        from_end = i - len(layers)
        if from_end >= -4:
            states.attention[from_end] = cls_attention(layer, hidden)
        hidden = layer(hidden, None)
        if from_end >= -4:
            states.hidden[from_end] = hidden
    return states
