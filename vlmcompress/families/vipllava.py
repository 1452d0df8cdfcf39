"""ViP-LLaVA: LLaVA whose connector reads several tower layers, concatenated."""

from __future__ import annotations

from dataclasses import dataclass

from vlmcompress.families.llava import Llava


@dataclass(frozen=True)
class VipLlava(Llava):
    """Older transformers (5.18, for one) name what is read in the plural."""

    layer_names: tuple[str, ...] = ("vision_feature_layer", "vision_feature_layers")


FAMILY = VipLlava("vipllava")
