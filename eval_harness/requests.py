"""One question about one picture, from the PIL image to the tensors that a model is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eval_harness import shape_configs
from vlmcompress.core.errors import UnsupportedModelError

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGE, _VIDEO, _START, _END = "<image>", "<video>", "<start>", "<end>"
_UNKNOWN, _BOS = "<unk>", "<s>"
_FIRST_WORD = 3
_CLIP_MEAN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_QUESTION = "What is written on the sign to the left of the red door?"


@dataclass(frozen=True)
class Request:
    """What a user hands over: a picture and a prompt about it.

    Attributes:
        processor: of the model.
        image: the picture.
        prompt: the text, with one placeholder of the picture in it.
    """

    processor: Any
    image: Image
    prompt: str

    def inputs(self, model: Any, batch: int = 1) -> dict[str, Tensor]:
        """What the model is called with: `batch` times the same request.

        Args:
            model: on whose device, and in whose dtype, tensors go.
            batch: rows.
        """
        made = self.processor(
            images=[self.image] * batch, text=[self.prompt] * batch, return_tensors="pt"
        )
        return dict(made.to(model.device, model.dtype))

    def describe(self) -> dict[str, Any]:
        """JSON-ready: size of the picture."""
        return {"image_size": list(self.image.size)}


def of_checkpoint(model: Any, processor: Any, image: Image, question: str = _QUESTION) -> Request:
    """A question about a picture, put as the model's chat template puts it.

    Raises:
        UnsupportedModelError: when the processor has no chat template.
    """
    if getattr(processor, "chat_template", None) is None:
        raise UnsupportedModelError(
            f"The processor of {type(model).__name__} has no chat template, so no prompt can be "
            "made; call eval_harness.bench with inputs or a Request of your own."
        )
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return Request(processor, image, prompt)


def of_shape(model: Any, *, text_tokens: int = 64, seed: int = 0) -> Request:
    """A request for a model of `eval_harness.shapes.build`.

    The processor is the family's own, so that pictures are cut up and placeholders counted as for
    a checkpoint; its tokenizer knows numbered words.

    Args:
        model: its `name_or_path` is the shape's name.
        text_tokens: ids that belong to no image, at least 2.
        seed: of pixels and words.

    Raises:
        ConfigError: for a model of no known shape.
    """
    config = model.config
    width, height = shape_configs.shape(model.name_or_path).image
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Request(processor_of(config), picture(noise), _prompt(config, text_tokens, seed))


def picture(pixels: np.ndarray) -> Image:
    """A picture of [height, width, 3] uint8."""
    from PIL import Image as Images

    return Images.fromarray(pixels)


def _prompt(config: Any, text_tokens: int, seed: int) -> str:
    """Numbered words around one placeholder, `text_tokens` ids of text in all."""
    words = _words(config)
    marked = config.model_type in _MARKED
    generator = torch.Generator().manual_seed(seed)
    free = max(0, text_tokens - 1 - 2 * marked)
    drawn = torch.randint(len(words), (free,), generator=generator).tolist()
    text, before = [words[i] for i in drawn], max(0, text_tokens // 2 - 1 - marked)
    image = [_START, _IMAGE, _END] if marked else [_IMAGE]
    return " ".join([_BOS, *text[:before], *image, *text[before:]])


def processor_of(config: Any) -> Any:
    """The processor that a model of this configuration comes with, and a tokenizer of words.

    Raises:
        UnsupportedModelError: for another family than those of the known shapes.
    """
    if config.model_type not in _PROCESSORS:
        raise UnsupportedModelError(
            f"There is no processor for a {config.model_type!r} model of a known shape; there are "
            f"some for {', '.join(_PROCESSORS)}."
        )
    return _PROCESSORS[config.model_type](config, _tokenizer(config))


#: Families that stand a mark before and after a picture.
_MARKED = ("qwen2_5_vl",)


def _specials(config: Any) -> dict[str, int]:
    marks = {_IMAGE: "image_token_id", _VIDEO: "video_token_id"}
    marks |= {_START: "vision_start_token_id", _END: "vision_end_token_id"}
    found = {mark: getattr(config, name, None) for mark, name in marks.items()}
    return {mark: number for mark, number in found.items() if isinstance(number, int)}


def _words(config: Any) -> list[str]:
    vocabulary = config.get_text_config().vocab_size
    last = min(vocabulary, *_specials(config).values())
    return [f"w{number}" for number in range(_FIRST_WORD, min(last, _FIRST_WORD + 1000))]


def _tokenizer(config: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = _specials(config)
    words = {word: _FIRST_WORD + i for i, word in enumerate(_words(config))}
    vocabulary = {_UNKNOWN: 0, _BOS: 1, **words, **specials}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        bos_token=_BOS,
        pad_token=_UNKNOWN,
        additional_special_tokens=list(specials),
    )
    made.image_token, made.image_token_id = _IMAGE, specials[_IMAGE]
    if _VIDEO in specials:
        made.video_token, made.video_token_id = _VIDEO, specials[_VIDEO]
    return made


def _llava(config: Any, tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = config.vision_config.image_size
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=_IMAGE,
        num_additional_image_tokens=1,
    )


def _llava_next(config: Any, tokenizer: Any) -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    side = config.vision_config.image_size
    return LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=_IMAGE,
        num_additional_image_tokens=1,
    )


def _llava_onevision(config: Any, tokenizer: Any) -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor
    from transformers.models.llava_onevision.video_processing_llava_onevision import (
        LlavaOnevisionVideoProcessor,
    )

    side = config.vision_config.image_size
    size = {"height": side, "width": side}
    views = config.image_grid_pinpoints
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=views, **_CLIP_MEAN),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(side // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=_IMAGE,
        video_token=_VIDEO,
        vision_aspect_ratio=config.vision_aspect_ratio,
    )


def _qwen2_5_vl(config: Any, tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    vision = config.vision_config
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(min_pixels=16 * vision.patch_size**2, max_pixels=2**24, **sizes),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes),
    )


_PROCESSORS: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        "llava": _llava,
        "llava_next": _llava_next,
        "llava_onevision": _llava_onevision,
        "qwen2_5_vl": _qwen2_5_vl,
    }
)
