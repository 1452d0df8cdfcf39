"""Configurations of the models whose shapes are known by name.

Sizes are those of the published checkpoints: LLaVA-1.5-7B and LLaVA-NeXT (1.6) with Vicuna-7B,
LLaVA-OneVision with SigLIP-so400m and Qwen2-7B, Qwen2.5-VL-7B. `llava-1.5-1b` puts a language model
of TinyLlama's shape behind LLaVA-1.5's tower. The `tiny` ones have each architecture at a toy size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from vlmcompress.core.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """A model by its sizes, and the picture that it is asked about.

    Attributes:
        config: makes its configuration.
        image: (width, height) of the picture in pixels; the processor makes of it what the name of
            the shape says (5 tiles, 4,096 patches).
    """

    config: Callable[[], PreTrainedConfig]
    image: tuple[int, int]


_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
_VICUNA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    **_ENDS,
}
_TINY_LLAMA = {
    **_VICUNA,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
}
_QWEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    **_ENDS,
}
_QWEN_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "out_hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_NEXT_VIEWS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_VIEWS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]

_TINY_CLIP = {
    **_CLIP_L,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}
_TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    **_ENDS,
}
_TINY_QWEN_TOWER = {
    **_QWEN_TOWER,
    "depth": 6,
    "hidden_size": 64,
    "out_hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": 8,
    "window_size": 32,
    "fullatt_block_indexes": [2, 5],
}


def _llava(tower: dict[str, Any], text: dict[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "llava",
        vision_config=tower,
        text_config=text,
        image_token_index=text["vocab_size"] - 1,
        image_seq_length=(tower["image_size"] // tower["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_next(
    tower: dict[str, Any], text: dict[str, Any], views: list[list[int]]
) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "llava_next",
        vision_config=tower,
        text_config=text,
        image_token_index=text["vocab_size"] - 1,
        image_grid_pinpoints=views,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_onevision(
    tower: dict[str, Any], text: dict[str, Any], views: list[list[int]]
) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "llava_onevision",
        vision_config=tower,
        text_config={"model_type": "qwen2", **text},
        image_token_index=text["vocab_size"] - 1,
        video_token_index=text["vocab_size"] - 2,
        image_grid_pinpoints=views,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def _qwen2_5_vl(tower: dict[str, Any], text: dict[str, Any], rotary: list[int]) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": rotary}
    last = text["vocab_size"]
    return AutoConfig.for_model(
        "qwen2_5_vl",
        vision_config=tower,
        text_config={**text, "rope_parameters": rope},
        image_token_id=last - 1,
        video_token_id=last - 2,
        vision_start_token_id=last - 3,
        vision_end_token_id=last - 4,
    )


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "llava-1.5-7b": Shape(lambda: _llava(_CLIP_L, _VICUNA), (336, 336)),
        "llava-1.5-1b": Shape(lambda: _llava(_CLIP_L, _TINY_LLAMA), (336, 336)),
        "llava-next-7b": Shape(lambda: _llava_next(_CLIP_L, _VICUNA, _NEXT_VIEWS), (672, 672)),
        "llava-onevision-7b": Shape(
            lambda: _llava_onevision(_SIGLIP, _QWEN, _ONEVISION_VIEWS), (768, 768)
        ),
        "qwen2.5-vl-7b": Shape(lambda: _qwen2_5_vl(_QWEN_TOWER, _QWEN, [16, 24, 24]), (896, 896)),
        "tiny": Shape(lambda: _llava(_TINY_CLIP, {"model_type": "llama", **_TINY_TEXT}), (48, 48)),
        "tiny-next": Shape(
            lambda: _llava_next(
                _TINY_CLIP, {"model_type": "llama", **_TINY_TEXT}, [[48, 96], [96, 48], [96, 96]]
            ),
            (96, 96),
        ),
        "tiny-onevision": Shape(
            lambda: _llava_onevision(
                {**_TINY_CLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
                _TINY_TEXT,
                [[48, 96], [96, 48], [96, 96]],
            ),
            (96, 96),
        ),
        "tiny-qwen2.5-vl": Shape(
            lambda: _qwen2_5_vl(_TINY_QWEN_TOWER, _TINY_TEXT, [2, 3, 3]), (128, 128)
        ),
    }
)


def names() -> list[str]:
    """Shapes that are known."""
    return list(SHAPES)


def shape(name: str) -> Shape:
    """A shape by its name.

    Raises:
        ConfigError: for an unknown one.
    """
    if name not in SHAPES:
        raise ConfigError(f"Unknown shape {name!r}; known shapes: {', '.join(SHAPES)}.")
    return SHAPES[name]
