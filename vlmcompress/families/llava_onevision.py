"""LLaVA-OneVision: AnyRes whose map of tiles is shrunk where it is large; several images whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmcompress.families.anyres import AnyRes


@dataclass(frozen=True)
class LlavaOnevision(AnyRes):
    """Images of a prompt with several are not cut into tiles."""

    def views(self, base: nn.Module, call: Mapping[str, Any]) -> list[int]:
        """One pass for each image of a prompt with several."""
        counts = super().views(base, call)
        per_prompt = call.get("batch_num_images")
        if per_prompt is None:
            return counts
        alone = [int(n) == 1 for n in per_prompt for _ in range(int(n))]
        return [count if cut else 1 for count, cut in zip(counts, alone, strict=True)]

    def packing(self, base: nn.Module, call: Mapping[str, Any]) -> dict[str, Any]:
        """The largest map of tiles."""
        config: Any = base.config
        name = "vision_aspect_ratio"
        return {name: call.get(name) or vars(config)[name]}


FAMILY = LlavaOnevision("llava_onevision")
