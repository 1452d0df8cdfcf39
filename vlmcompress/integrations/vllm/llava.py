"""LLaVA-1.5 and LLaVA-NeXT with short images, in vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmcompress.integrations.vllm.evidence import pick_views
from vlmcompress.integrations.vllm.parts import (
    TOWER_NAMES,
    HashedProcessor,
    reader,
    served_by,
)
from vlmcompress.integrations.vllm.registry import serving_of
from vlmcompress.integrations.vllm.serving import Serving
from vlmcompress.live.session import Session


class LlavaInfo(llava.LlavaProcessingInfo):
    """Counts what the method leaves."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Placeholders of an image."""
        n = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        serving = serving_of(self.ctx.model_config)
        return n if serving is None else serving.tokens_kept(serving.layout(n))


class LlavaNextInfo(llava_next.LlavaNextProcessingInfo):
    """Counts what the method leaves of all views."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Placeholders of an image."""
        n = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        serving = serving_of(self.ctx.model_config)
        if serving is None:
            return n
        return serving.tokens_kept(serving.layout(n, image_sizes=(image_height, image_width)))

    def get_image_size_with_most_features(self) -> Any:
        """The size that gives the tower most to do, whatever is left of it."""
        return llava_next.LlavaNextProcessingInfo(self.ctx).get_image_size_with_most_features()


class LlavaProcessor(HashedProcessor, llava.LlavaMultiModalProcessor):
    """The engine's, with hashes that know the method."""


class LlavaNextProcessor(HashedProcessor, llava_next.LlavaNextMultiModalProcessor):
    """The engine's, with hashes that know the method."""


def _info(ctx: Any) -> Any:
    """The engine's own for Pixtral towers, which are served as they are."""
    found = llava._build_llava_or_pixtral_hf_info(ctx)
    return LlavaInfo(ctx) if type(found) is llava.LlavaProcessingInfo else found


def _processor(info: Any, dummy_inputs: Any) -> Any:
    if isinstance(info, LlavaInfo):
        return LlavaProcessor(info, dummy_inputs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


class _Reading:
    """Hooks in front of the attention that a method looks at; in front of the engine's model."""

    vision_tower: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Build the engine's model and put them there."""
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.serving = served_by(vllm_config)
        self.reader = None if self.serving is None else reader(self.serving, self.vision_tower)

    def reading(self, serving: Serving) -> Session:
        """A session for the images that the tower sees next."""
        session = serving.session()
        if self.reader is not None:
            self.reader.start(session)
        return session


@MULTIMODAL_REGISTRY.register_processor(
    _processor, info=_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class CompressedLlava(_Reading, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5: rows are selected before the connector, or behind it, as by `patch`."""

    hf_to_vllm_mapper = TOWER_NAMES | llava.LlavaForConditionalGeneration.hf_to_vllm_mapper

    def _process_image_input(self, image_input: Any) -> Any:
        serving = self.serving
        if serving is None or image_input["type"] != "pixel_values":
            return super()._process_image_input(image_input)
        session = self.reading(serving)
        features = self._process_image_pixels(image_input)
        if serving.before_connector:
            kept = serving.compress(list(features), {}, session)
            return list(self.multi_modal_projector(torch.stack(kept)))
        return serving.compress(list(self.multi_modal_projector(features)), {}, session)

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Rows that LoRA in tower and connector meets, which are more than come out."""
        if self.serving is None or not mm_kwargs or "pixel_values" not in mm_kwargs:
            return super().get_mm_lora_token_counts(
                modality=modality, mm_kwargs=mm_kwargs, num_mm_embeds=num_mm_embeds
            )
        vision = self.config.vision_config
        n = (vision.image_size // vision.patch_size) ** 2 + int(self.serving.has_cls)
        return n, num_mm_embeds if self.serving.before_connector else n - int(self.serving.has_cls)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class CompressedLlavaNext(_Reading, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT: rows are selected where the views of an image have been put together."""

    hf_to_vllm_mapper = TOWER_NAMES | llava_next.LlavaNextForConditionalGeneration.hf_to_vllm_mapper

    def _process_image_input(self, image_input: Any) -> Any:
        serving = self.serving
        if serving is None or image_input["type"] != "pixel_values":
            return super()._process_image_input(image_input)
        session = self.reading(serving)
        units = super()._process_image_input(image_input)
        sizes = torch.as_tensor(image_input["image_sizes"])
        given = [len(pixels) for pixels in image_input["pixel_values"]]
        pick_views(session, _real(given, serving.views(sizes)))
        return serving.compress(units, {"image_sizes": sizes}, session)


def _real(given: list[int], views: list[int]) -> Tensor:
    """Numbers of the views of every image that are no filling.

    Args:
        given: views of each image, as they came.
        views: how many of them are real; the others come last.
    """
    rows = torch.arange(sum(given)).split(given)
    return torch.cat([of_image[:n] for of_image, n in zip(rows, views, strict=True)])
