"""Models of known shapes with random weights: timings need no checkpoint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from eval_harness import requests, shape_configs

_CLIP_L_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
_POOL = 1_048_583  # a prime, so that tiled rows do not repeat


def names() -> list[str]:
    """Shapes that `build` knows."""
    return shape_configs.names()


def config(name: str) -> Any:
    """The configuration of a shape.

    Args:
        name: one of `names()`.

    Raises:
        ConfigError: for another name.
    """
    return shape_configs.shape(name).config()


def build(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> PreTrainedModel:
    """A model of a known shape with random weights, in eval mode.

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
        model: Any = AutoModelForImageTextToText.from_config(
            shape, dtype=dtype, attn_implementation=attn_implementation
        )
    _fill(model, seed)
    model.name_or_path = model.config._name_or_path = name
    model.eval()
    return model


def text_half(model: PreTrainedModel, seed: int = 0) -> tuple[nn.Module, Any]:
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
) -> PreTrainedModel:
    """The vision tower of a known shape alone, with random weights, in eval mode.

    Args:
        name: one of `names()`.
        dtype: type of all weights.
        device: where it ends up.
    """
    device = torch.device(device)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), no_init_weights(), device:
        tower: Any = AutoModel.from_config(config(name).vision_config, dtype=dtype)
    _fill(tower, seed=0)
    tower.name_or_path = tower.config._name_or_path = name
    tower.eval()
    return tower


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
    model: PreTrainedModel, *, text_tokens: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """One prompt with one image, on the model's device and in its dtype.

    Args:
        model: a model of `build`.
        text_tokens: number of text ids around the image, at least 2.
        seed: of pixels and ids.

    Returns:
        What the family's processor makes of a picture and a text: `pixel_values`, `input_ids` and
        `attention_mask` of [1, L], and what tells the family of the picture's size.
    """
    return requests.of_shape(model, text_tokens=text_tokens, seed=seed).inputs(model)
