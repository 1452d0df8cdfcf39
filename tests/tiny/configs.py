"""Configurations of tiny models: the architecture of each family at a toy size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, VipLlavaConfig

PAD, BOS, EOS = 0, 1, 2
FIRST_TEXT_ID, LAST_TEXT_ID = 3, 99
IMAGE, START, END, BREAK, VIDEO = 100, 101, 102, 103, 104
TILE = 105
INDICATORS = (106, 107, 108, 109, 110)
VIDEO_START, VIDEO_END = 111, 112
VOCAB = 128

WIDTH, TEXT_WIDTH = 32, 64
PATCH = 4

TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "patch_size": PATCH,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def _text(model_type: str, **overrides: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TEXT, **overrides}


def _tower(model_type: str, side: int, **overrides: Any) -> dict[str, Any]:
    """A tower for square images of `side` patches."""
    return {"model_type": model_type, **TOWER, "image_size": side * PATCH, **overrides}


def _siglip(side: int, head: bool = False) -> dict[str, Any]:
    return _tower("siglip_vision_model", side, vision_use_head=head)


def _config(model_type: str, tower: dict, text: dict, **overrides: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, vision_config=tower, text_config=text, **overrides)


def _llava() -> PreTrainedConfig:
    tower = _tower("clip_vision_model", 5)
    return _config("llava", tower, _text("llama"), image_token_index=IMAGE, image_seq_length=25)


def _llava_siglip() -> PreTrainedConfig:
    return _config(
        "llava",
        _siglip(5),
        _text("qwen2"),
        image_token_index=IMAGE,
        image_seq_length=25,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _llava_pixtral() -> PreTrainedConfig:
    return _config(
        "llava",
        _tower("pixtral", 16),
        _text("mistral", head_dim=16),
        image_token_index=IMAGE,
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _vipllava() -> PreTrainedConfig:
    plural = "vision_feature_layers" in VipLlavaConfig.__annotations__  # older transformers
    return _config(
        "vipllava",
        _tower("clip_vision_model", 5, num_hidden_layers=7),
        _text("llama"),
        image_token_index=IMAGE,
        image_seq_length=25,
        **{f"vision_feature_layer{plural * 's'}": [-2, -4, -6, 3]},
    )


def _paligemma() -> PreTrainedConfig:
    return _config(
        "paligemma",
        _siglip(5),
        _text("gemma", num_key_value_heads=1, head_dim=16, tie_word_embeddings=False),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
        projection_dim=TEXT_WIDTH,
        hidden_size=TEXT_WIDTH,
        vocab_size=VOCAB,
    )


def _qwen2_vl() -> PreTrainedConfig:
    size = {"embed_dim": WIDTH, "hidden_size": TEXT_WIDTH, "mlp_ratio": 2}
    return _qwen_vl("qwen2_vl", **size)


def _qwen2_5_vl() -> PreTrainedConfig:
    size = {"hidden_size": WIDTH, "out_hidden_size": TEXT_WIDTH, "intermediate_size": 48}
    # Windows of 2 x 2 tokens; what methods read by default is behind the second block.
    windows = {"window_size": 4 * PATCH, "fullatt_block_indexes": [2, 3, 4, 5]}
    return _qwen_vl("qwen2_5_vl", **size, **windows)


def _qwen_vl(kind: str, **tower: Any) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    return _config(
        kind,
        {"depth": 6, "num_heads": 4, "patch_size": PATCH, **tower},
        {**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _glm4v() -> PreTrainedConfig:
    tower = {
        "depth": 6,
        "hidden_size": WIDTH,
        "num_heads": 4,
        "image_size": 12 * PATCH,
        "patch_size": PATCH,
        "out_hidden_size": TEXT_WIDTH,
        "intermediate_size": 48,
    }
    rope = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    }
    return _config(
        "glm4v",
        tower,
        {**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )


def _kimi_k25() -> PreTrainedConfig:
    text = _text(
        "deepseek_v3",
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        num_mtp_layers=0,
    )
    tower = {**TOWER, "pos_emb_height": 8, "pos_emb_width": 8}
    return _config(
        "kimi_k25",
        tower,
        text,
        projection_hidden_size=WIDTH,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _ovis2() -> PreTrainedConfig:
    tower = {**TOWER, "image_size": 10 * PATCH, "vocab_size": 69, "hidden_stride": 2}
    return _config(
        "ovis2",
        tower,
        _text("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=list(INDICATORS),
        vocab_size=VOCAB,
        hidden_size=TEXT_WIDTH,
    )


def _cohere2_text() -> dict[str, Any]:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return _text("cohere2", layer_types=layers, logit_scale=1.0)


def _aya_vision() -> PreTrainedConfig:
    return _config("aya_vision", _siglip(10), _cohere2_text(), image_token_index=IMAGE)


def _cohere2_vision() -> PreTrainedConfig:
    return _config(
        "cohere2_vision",
        _siglip(10, head=True),
        _cohere2_text(),
        image_token_id=IMAGE,
        alignment_intermediate_size=96,
    )


def _llava_next() -> PreTrainedConfig:
    return _config(
        "llava_next",
        _tower("clip_vision_model", 4),
        _text("llama"),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16]],
    )


def _llava_onevision() -> PreTrainedConfig:
    return _config(
        "llava_onevision",
        _siglip(4),
        _text("qwen2"),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )


def _internvl() -> PreTrainedConfig:
    tower = {**TOWER, "image_size": [40, 40], "patch_size": [PATCH, PATCH]}
    return _config("internvl", tower, _text("qwen2"), image_token_id=IMAGE, image_seq_length=25)


def _gemma3() -> PreTrainedConfig:
    text = {**TEXT, "head_dim": 16, "sliding_window": 64}
    return _config("gemma3", _siglip(8), text, image_token_index=IMAGE, mm_tokens_per_image=16)


def _smolvlm() -> PreTrainedConfig:
    tower = {**TOWER, "image_size": 8 * PATCH}
    return _config("smolvlm", tower, _text("llama"), image_token_id=IMAGE, scale_factor=2)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava": _llava,
    "llava_siglip": _llava_siglip,
    "llava_pixtral": _llava_pixtral,
    "vipllava": _vipllava,
    "paligemma": _paligemma,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "glm4v": _glm4v,
    "kimi_k25": _kimi_k25,
    "ovis2": _ovis2,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
}
UNSUPPORTED_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "internvl": _internvl,
    "gemma3": _gemma3,
    "smolvlm": _smolvlm,
}


def text_config() -> PreTrainedConfig:
    """The configuration of a plain language model."""
    return AutoConfig.for_model(**_text("llama"))
