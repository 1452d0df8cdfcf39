"""Qwen2-VL and Qwen2.5-VL with short images, in vLLM.

What is left of an image is numbered like text, on all three axes of M-RoPE, as by
`patch(..., positions="contiguous")`. Images that keep all their tokens, and videos, keep their
places on the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from vllm.model_executor.models import qwen2_5_vl, qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmcompress.core.errors import ConfigError
from vlmcompress.integrations.vllm.parts import HashedProcessor, served_by
from vlmcompress.integrations.vllm.registry import serving_of
from vlmcompress.integrations.vllm.serving import Serving


class _Counting:
    """Counts what the method leaves; in front of the engine's `ProcessingInfo`."""

    ctx: Any
    get_hf_config: Any
    _get_vision_info: Any

    def get_num_image_tokens(
        self, *, image_width: int, image_height: int, image_processor: Any, mm_kwargs: Any
    ) -> int:
        """Placeholders of an image."""
        size, n = self._get_vision_info(
            image_width=image_width,
            image_height=image_height,
            image_processor=image_processor,
            mm_kwargs=mm_kwargs,
            modality="image",
        )
        serving = serving_of(self.ctx.model_config)
        if serving is None:
            return n
        patch = self.get_hf_config().vision_config.patch_size
        return _kept(serving, n, (1, size.height // patch, size.width // patch))


class _Shortening(HashedProcessor):
    """Short placeholders, and hashes that know the method; in front of the engine's processor."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates: Sequence[Any] = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        )
        serving = serving_of(self.info.ctx.model_config)
        if serving is None:
            return updates
        return [
            replace(update, replacement=_Short(serving, update.replacement, out_mm_kwargs["image"]))
            if update.modality == "image" and "image" in out_mm_kwargs
            else update
            for update in updates
        ]


class _Short:
    """Placeholders of images, as many as the method leaves of those that come as pixels."""

    def __init__(self, serving: Serving, whole: Any, items: Any) -> None:
        self._serving, self._whole, self._items = serving, whole, items

    def __call__(self, index: int) -> list[int]:
        ids: list[int] = self._whole(index)
        item = self._items[index]
        if "pixel_values" not in item:
            return ids
        grid = tuple(item["image_grid_thw"].data.tolist())
        return ids[: _kept(self._serving, len(ids), grid)]


def _kept(serving: Serving, n: int, grid: tuple[int, ...]) -> int:
    return serving.tokens_kept(serving.layout(n, image_grid_thw=grid))


class _Compressed:
    """Selects rows behind the merger, which ends the tower; in front of the engine's model."""

    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Build the engine's model.

        Raises:
            ConfigError: where the engine prunes videos, for which it gives every row of an image
                the place that it had in the whole image.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.serving = served_by(vllm_config)
        if self.serving is not None and getattr(self, "is_multimodal_pruning_enabled", False):
            raise ConfigError(
                "The engine's own pruning of videos (--video-pruning-rate) needs every row of an "
                "image; leave it at 0, or serve this model without vlmcompress."
            )

    def _process_image_input(self, image_input: Any) -> Any:
        units = super()._process_image_input(image_input)  # type: ignore[misc]
        if self.serving is None or image_input["type"] != "pixel_values":
            return units
        call = {"image_grid_thw": image_input["image_grid_thw"]}
        return self.serving.compress(units, call, self.serving.session())

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Rows that LoRA in tower and merger meets, which are more than come out."""
        if self.serving is not None and modality == "image" and mm_kwargs:
            grid = mm_kwargs["image_grid_thw"].data
            num_mm_embeds = int(grid.prod()) // self.config.vision_config.spatial_merge_size**2
        found: tuple[int, int | None] = super().get_mm_lora_token_counts(  # type: ignore[misc]
            modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds
        )
        return found

    def iter_mm_grid_thw(self, mm_features: Any) -> Iterator[Any]:
        """Places of whatever is whole; all other tokens are numbered one by one."""
        merge = self.config.vision_config.spatial_merge_size**2
        whole = [
            feature
            for feature in mm_features
            if feature.modality != "image"
            or feature.mm_position.length
            == int(feature.data["image_grid_thw"].data.prod()) // merge
        ]
        yield from super().iter_mm_grid_thw(whole)  # type: ignore[misc]


class Qwen2VLInfo(_Counting, qwen2_vl.Qwen2VLProcessingInfo):
    """The engine's, with short images."""


class Qwen2VLProcessor(_Shortening, qwen2_vl.Qwen2VLMultiModalProcessor):
    """The engine's, with short images."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=Qwen2VLInfo, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class CompressedQwen2VL(_Compressed, qwen2_vl.Qwen2VLForConditionalGeneration):
    """The engine's, with short images."""


class Qwen25VLInfo(_Counting, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    """The engine's, with short images."""


class Qwen25VLProcessor(_Shortening, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """The engine's, with short images."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor, info=Qwen25VLInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class CompressedQwen25VL(_Compressed, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """The engine's, with short images."""
