"""Models that the engine is tested with, made of the reference model's weights.

Towers are saved under the names that the engine's own classes expect.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlmcompress.reference.scenes import PATCH, SIDE
from vlmcompress.reference.tokenizer import CHAT_TEMPLATE, EOS, PAD, build_tokenizer
from vlmcompress.reference.weights import WEIGHTS_DIR, load

PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
_FILE = "model.safetensors"
_WIDE_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_WIDE_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
}
_QWEN_TOKENS = (_START, _END, _IMAGE, _) = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def llava(folder: Path) -> Path:
    """The reference model: LLaVA-1.5's architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in WEIGHTS_DIR.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    shutil.copyfile(WEIGHTS_DIR / _FILE, folder / _FILE)
    _rename(folder / _FILE)
    return folder


def llava_next(folder: Path) -> Path:
    """LLaVA-NeXT's architecture: images in up to five views, and a drawn newline row."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_llava_next import (
        LlavaNextImageProcessor,
    )

    small, processor = load()
    config = LlavaNextConfig(
        vision_config=small.config.vision_config,
        text_config=small.config.text_config,
        image_token_index=small.config.image_token_index,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=small.config.vision_feature_layer,
        vision_feature_select_strategy=small.config.vision_feature_select_strategy,
        tie_word_embeddings=True,
    )
    model: Any = LlavaNextForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(small.state_dict(), strict=False)
    assert not unexpected
    assert missing == ["model.image_newline"], missing
    draw = torch.Generator().manual_seed(0)
    model.model.image_newline.data.normal_(0, 1, generator=draw)
    model.generation_config = small.generation_config
    model.save_pretrained(folder)
    images = LlavaNextImageProcessor(
        do_center_crop=False,
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    LlavaNextProcessor(
        image_processor=images,
        tokenizer=processor.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    _rename(folder / _FILE)
    return folder


def qwen2_vl(folder: Path) -> Path:
    """Qwen2-VL's architecture with drawn weights, small."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    tokenizer = _qwen_tokenizer()
    tower = {"embed_dim": 128, "hidden_size": 128, "mlp_ratio": 2}
    config = Qwen2VLConfig(**_qwen_config(tokenizer, tower))
    return _qwen(folder, Qwen2VLForConditionalGeneration, config, Qwen2VLProcessor, tokenizer)


def qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL's architecture with drawn weights, small; windows are 4 x 4 tokens."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )

    tokenizer = _qwen_tokenizer()
    tower = {"hidden_size": 128, "out_hidden_size": 128, "intermediate_size": 256}
    windows = {"window_size": 112, "fullatt_block_indexes": [2]}
    config = Qwen2_5_VLConfig(**_qwen_config(tokenizer, {**tower, **windows}))
    return _qwen(folder, Qwen2_5_VLForConditionalGeneration, config, Qwen2_5_VLProcessor, tokenizer)


def _qwen_tokenizer() -> Any:
    """The reference model's words with the markers of images."""
    from transformers import PreTrainedTokenizerFast

    known = build_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known.backend_tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left"
    )
    tokenizer.add_tokens(list(_QWEN_TOKENS), special_tokens=True)
    return tokenizer


def _qwen_config(tokenizer: Any, tower: Mapping[str, Any]) -> dict[str, Any]:
    """What the configurations of both architectures are given."""
    vocabulary = tokenizer.get_vocab()
    start, end, image, video = (vocabulary[each] for each in _QWEN_TOKENS)
    return {
        "text_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "vision_config": {"depth": 3, "num_heads": 4, "patch_size": 14, **tower},
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "tie_word_embeddings": False,
    }


def _qwen(
    folder: Path, model_class: Any, config: Any, processor_class: Any, tokenizer: Any
) -> Path:
    """A folder with a model of drawn weights and its processor."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = model_class(config)
    # The usual start gives logits that rounding can reorder.
    model.lm_head.weight.data.mul_(50)
    model.save_pretrained(folder)
    sizes = {"min_pixels": 56 * 56, "max_pixels": 448 * 448}
    processor_class(
        image_processor=Qwen2VLImageProcessor(**sizes),
        video_processor=Qwen2VLVideoProcessor(**sizes),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE.replace("<image>", "".join((_START, _IMAGE, _END))),
    ).save_pretrained(folder)
    return folder


def wide(folder: Path) -> Path:
    """LLaVA-1.5's architecture with drawn weights, large enough that the prompt is what costs.

    CLIP ViT-B/16's tower with 196 tokens and a language model of 0.1 billion parameters; tokenizer
    and processor are the reference model's.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    _, processor = load()
    config = LlavaConfig.from_pretrained(WEIGHTS_DIR)
    for name, value in _WIDE_TOWER.items():
        setattr(config.vision_config, name, value)
    for name, value in _WIDE_TEXT.items():
        setattr(config.text_config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlavaForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    _rename(folder / _FILE)
    return folder


def _rename(file: Path) -> None:
    """Give the tower's weights the names of an engine's tower."""
    within = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")
    named = {within.sub(r"\1vision_model.", k): v for k, v in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})


MODELS: dict[str, Callable[[Path], Path]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
}

#: What is measured under load, and in which precision.
LOADED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "llava": (llava, "float32"),
    "wide": (wide, "bfloat16"),
}
