"""Tiny random vision transformers without a language model, of three libraries, with every head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import timm
import torch
import transformers
from open_clip.transformer import Transformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIDE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 40, 8, 32, 4, 4, 5
N = (SIDE // PATCH) ** 2

_SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_MLP = {"intermediate_size": 2 * WIDTH}
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 8,
}


def _transformers(model: str, config: str, kernel: str = "sdpa", **options: Any) -> Any:
    made = getattr(transformers, config)(**options, attn_implementation=kernel)
    return getattr(transformers, model)(made)


def _two_towers(stem: str, model: str, kernel: str) -> Any:
    config = getattr(transformers, f"{stem}Config")(
        text_config=_TEXT, vision_config=_SHAPE | _MLP, num_labels=CLASSES
    )
    config._attn_implementation = kernel
    return getattr(transformers, model)(config)


def _dino(stem: str, model: str, kernel: str, **more: Any) -> Any:
    options = _SHAPE | {"mlp_ratio": 2, "num_labels": CLASSES} | more
    return _transformers(f"{stem}{model}", f"{stem}Config", kernel, **options)


def _timm(kind: type = VisionTransformer, **options: Any) -> Any:
    shape = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2}
    common = {"img_size": SIDE, "patch_size": PATCH, "num_classes": CLASSES}
    return kind(**common | shape | options)


def _open_clip(model: str = "CLIP", trunk: str = "", width: int = 16, **options: Any) -> Any:
    vision = {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH}
    vision |= {"head_width": WIDTH // HEADS, "mlp_ratio": 2.0} | options
    if trunk:
        vision = {"image_size": SIDE, "timm_model_name": trunk, "timm_proj": "linear"} | options
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
    if model == "CoCa":
        decoder = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
        text |= {"embed_cls": True, "output_tokens": True}
        return open_clip.CoCa(16, decoder, text, vision | {"output_tokens": True})
    return getattr(open_clip, model)(width, vision, text)


def _rows_first() -> Any:
    """As in versions of open_clip whose blocks take [n, b, d]."""
    model = _open_clip()
    state = model.visual.transformer.state_dict()
    model.visual.transformer = Transformer(WIDTH, DEPTH, HEADS, 2.0, batch_first=False)
    model.visual.transformer.load_state_dict(state)
    return model


def _timm_trunk() -> Any:
    """open_clip's SigLIP models: a timm trunk that pools by attention."""
    model = _open_clip("CustomTextCLIP", "test_vit", timm_pool="token")
    model.visual.trunk = _timm(global_pool="map", class_token=False, num_classes=0)
    model.visual.head = nn.Linear(WIDTH, 16)
    return model


BUILD: dict[str, Callable[..., Any]] = {
    "clip": lambda k="sdpa": _two_towers("CLIP", "CLIPModel", k),
    "clip_vision": lambda k="sdpa": _transformers(
        "CLIPVisionModel", "CLIPVisionConfig", k, **_SHAPE, **_MLP
    ),
    "clip_projection": lambda k="sdpa": _transformers(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", k, **_SHAPE, **_MLP
    ),
    "clip_classifier": lambda k="sdpa": _two_towers("CLIP", "CLIPForImageClassification", k),
    "siglip": lambda k="sdpa": _two_towers("Siglip", "SiglipModel", k),
    "siglip_vision": lambda k="sdpa": _transformers(
        "SiglipVisionModel", "SiglipVisionConfig", k, **_SHAPE, **_MLP
    ),
    "siglip_classifier": lambda k="sdpa": _two_towers("Siglip", "SiglipForImageClassification", k),
    "dinov2": lambda k="sdpa": _dino("Dinov2", "Model", k),
    "dinov2_swiglu": lambda k="sdpa": _dino("Dinov2", "Model", k, use_swiglu_ffn=True),
    "dinov2_classifier": lambda k="sdpa": _dino("Dinov2", "ForImageClassification", k),
    "registers": lambda k="sdpa": _dino("Dinov2WithRegisters", "Model", k, num_register_tokens=3),
    "registers_classifier": lambda k="sdpa": _dino(
        "Dinov2WithRegisters", "ForImageClassification", k, num_register_tokens=3
    ),
    "vit": lambda k="sdpa": _transformers("ViTModel", "ViTConfig", k, **_SHAPE, **_MLP),
    "vit_classifier": lambda k="sdpa": _transformers(
        "ViTForImageClassification", "ViTConfig", k, num_labels=CLASSES, **_SHAPE, **_MLP
    ),
    "timm_token": lambda: _timm(),
    "timm_scaled": lambda: _timm(qk_norm=True, init_values=0.5, qkv_bias=True),
    "timm_avg": lambda: _timm(global_pool="avg"),
    "timm_avg_all": lambda: _timm(global_pool="avg", pool_include_prefix=True),
    "timm_avg_registers": lambda: _timm(global_pool="avg", class_token=False, reg_tokens=4),
    "timm_registers": lambda: _timm(reg_tokens=3),
    "timm_map": lambda: _timm(global_pool="map", class_token=False),
    "timm_map_all": lambda: _timm(global_pool="map", pool_include_prefix=True),
    "timm_max": lambda: _timm(global_pool="max"),
    "timm_distilled": lambda: _timm(VisionTransformerDistilled),
    "open_clip": lambda: _open_clip(),
    "open_clip_tokens": lambda: _open_clip(output_tokens=True),
    "open_clip_avg": lambda: _open_clip(pool_type="avg"),
    "open_clip_avg_late": lambda: _open_clip(pool_type="avg", final_ln_after_pool=True),
    "open_clip_own": lambda: _open_clip(qk_norm=True, ls_init_value=0.5),
    "open_clip_rows_first": _rows_first,
    "open_clip_coca": lambda: _open_clip(
        "CoCa", attentional_pool=True, attn_pooler_queries=6, attn_pooler_heads=2
    ),
    "open_clip_parallel": lambda: _open_clip(
        width=WIDTH, attentional_pool="parallel", attn_pooler_queries=6, attn_pooler_heads=2
    ),
    "open_clip_cascade": lambda: _open_clip(
        width=WIDTH, attentional_pool="cascade", attn_pooler_queries=6, attn_pooler_heads=2
    ),
    "open_clip_timm": _timm_trunk,
}


def build(name: str, kernel: str = "") -> Any:
    """A tiny random model in eval mode, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILD[name](kernel) if kernel else BUILD[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                if parameter.ndim < 2:
                    parameter.add_(0.1 * noise)
                else:
                    parameter.copy_(0.15 * noise)
    return model.eval()


def pixels(b: int = 3) -> Tensor:
    """Images, the same every time."""
    return torch.randn(b, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def embed(model: Any, images: Tensor) -> Tensor:
    """What a caller wants of a model: image embeddings or logits."""
    if hasattr(model, "encode_image"):
        made = model.encode_image(images)
        return made[0] if isinstance(made, tuple) else made
    if hasattr(model, "get_image_features"):
        return model.get_image_features(images).pooler_output
    output = model(images)
    if isinstance(output, Tensor):
        return output
    names = ("logits", "image_embeds", "pooler_output")
    return next(output[name] for name in names if output.get(name) is not None)


__all__ = ["BUILD", "CLASSES", "DEPTH", "SIDE", "N", "build", "embed", "pixels", "timm"]
