"""Models of known shapes with random weights: timings need no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from vlmcompress.core.errors import ConfigError

_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SHAPES: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = MappingProxyType(
    {
        "llava-1.5-7b": (
            _CLIP_L,
            {
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "vocab_size": 32064,
            },
        ),
        "llava-1.5-1b": (
            _CLIP_L,
            {
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 22,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "vocab_size": 32064,
            },
        ),
        "tiny": (
            {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "image_size": 48,
                "patch_size": 8,
            },
            {
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 256,
            },
        ),
    }
)
_CLIP_L_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
_POOL = 1_048_583  # a prime, so that tiled rows do not repeat
_BOS, _FIRST_TEXT = 1, 3


def names() -> list[str]:
    """Shapes that `build` knows."""
    return list(_SHAPES)


def config(name: str) -> LlavaConfig:
    """The configuration of a shape.

    Args:
        name: one of `names()`.

    Raises:
        ConfigError: for another name.
    """
    if name not in _SHAPES:
        raise ConfigError(f"Unknown shape {name!r}; known shapes: {', '.join(_SHAPES)}.")
    tower, text = _SHAPES[name]
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=LlamaConfig(**text, max_position_embeddings=4096),
        image_token_index=text["vocab_size"] - 1,
        image_seq_length=(tower["image_size"] // tower["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def build(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """A LLaVA of a known shape with random weights, in eval mode.

    Weights are made in `dtype` at once (no float32 copy) from one tiled pool of normal numbers.

    Args:
        name: one of `names()`.
        dtype: type of all weights.
        device: where the model ends up.
        attn_implementation: attention kernel of tower and language model.
        seed: of the weights; equal seeds give equal weights.

    Returns:
        The model; its `name_or_path` is the shape's name.
    """
    shape = config(name)
    device = torch.device(device)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), no_init_weights(), device:
        model = LlavaForConditionalGeneration._from_config(
            shape, dtype=dtype, attn_implementation=attn_implementation
        )
    _fill(model, seed)
    model.name_or_path = model.config._name_or_path = name
    return model.eval()


def text_half(model: LlavaForConditionalGeneration, seed: int = 0) -> tuple[nn.Module, Any]:
    """What `patch(clip=...)` takes: the text half of a CLIP ViT-L/14, with random weights.

    Its vision half is a single block of the width of the model's tower, of which a text-aware
    method uses the last normalisation and the projection.

    Args:
        model: a model of `build`.
        seed: of the weights.

    Returns:
        A `CLIPModel` in the model's dtype and on its device, and a tokenizer that makes one id of
        each word.
    """
    tower: Any = model.config.vision_config
    vision = CLIPVisionConfig(**{**tower.to_dict(), "num_hidden_layers": 1})
    shape = CLIPConfig(text_config=_CLIP_L_TEXT, vision_config=vision.to_dict(), projection_dim=768)
    with no_init_weights(), model.device:
        clip = CLIPModel._from_config(shape, dtype=model.dtype)
    _fill(clip, seed)
    return clip.eval(), _Words(clip.config.text_config.vocab_size)


class _Words:
    """A tokenizer's calls that `patch` makes, with a number for each word."""

    def __init__(self, vocabulary: int) -> None:
        self.bos_token_id, self.eos_token_id = vocabulary - 2, vocabulary - 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[len(word) for word in text.split()])


def build_tower(
    name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CLIPVisionModel:
    """The vision tower of a known shape alone, with random weights, in eval mode.

    Args:
        name: one of `names()`.
        dtype: type of all weights.
        device: where it ends up.
    """
    device = torch.device(device)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), no_init_weights(), device:
        tower = CLIPVisionModel._from_config(config(name).vision_config, dtype=dtype)
    _fill(tower, seed=0)
    return tower.eval()


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed))
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        fan_in = parameter[0].numel()
        values = (pool * fan_in**-0.5).to(parameter.dtype).to(parameter.device)
        for chunk in parameter.view(-1).split(_POOL):
            chunk.copy_(values[: chunk.numel()])


def example_inputs(
    model: LlavaForConditionalGeneration, *, text_tokens: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """One prompt with one image, on the model's device.

    Args:
        model: a model of `build`.
        text_tokens: number of text ids around the image, at least 2.
        seed: of pixels and ids.

    Returns:
        `pixel_values` [1, 3, H, W] in the model's dtype, `input_ids` and `attention_mask` of
        [1, n + text_tokens].
    """
    generator = torch.Generator().manual_seed(seed)
    tower: Any = model.config.vision_config
    image = model.config.image_token_id
    text = torch.randint(_FIRST_TEXT, image, (text_tokens,), generator=generator)
    text[0] = _BOS
    before = min(text_tokens - 1, max(1, text_tokens // 2))
    placeholders = torch.full((model.config.image_seq_length,), image)
    ids = torch.cat([text[:before], placeholders, text[before:]])[None]
    pixels = torch.randn(1, 3, tower.image_size, tower.image_size, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
