"""Model families: one file each, found by `config.model_type`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmcompress.core.errors import UnsupportedModelError
from vlmcompress.families.base import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED: tuple[str, ...] = (
    "aya_vision",
    "cohere2_vision",
    "glm4v",
    "kimi_k25",
    "llava",
    "llava_next",
    "llava_onevision",
    "ovis2",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "vipllava",
)


def family_of(model: PreTrainedModel | Any) -> Family:
    """The facts about `model`'s family.

    Raises:
        UnsupportedModelError: when nothing is known about it.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no transformers config; pass a HuggingFace "
            "vision-language model."
        )
    if model_type not in SUPPORTED:
        text_only = not hasattr(config, "vision_config")
        why = "has no vision tower" if text_only else "is not supported yet"
        raise UnsupportedModelError(
            f"Model type {model_type!r} ({type(model).__name__}) {why}; supported are "
            f"{', '.join(SUPPORTED)}."
        )
    family = import_module(f"vlmcompress.families.{model_type}").FAMILY
    assert isinstance(family, Family)  # by construction of this package
    return family


__all__ = ["SUPPORTED", "Family", "family_of"]
