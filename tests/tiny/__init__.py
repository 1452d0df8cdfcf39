"""Tiny random vision-language models and processor-like inputs for them (CPU, no download)."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from . import configs

__all__ = [
    "FAMILIES",
    "RAGGED_GRID_FAMILIES",
    "UNSUPPORTED",
    "Prompt",
    "build",
    "inputs",
    "special_ids",
    "text_only",
    "tokens_per_image",
]

FAMILIES: tuple[str, ...] = tuple(configs.CONFIGS)
"""Families (and variants) that `build` and `inputs` know."""

UNSUPPORTED: tuple[str, ...] = tuple(configs.UNSUPPORTED_CONFIGS)
"""Families that `build` knows, without inputs."""

RAGGED_GRID_FAMILIES: tuple[str, ...] = (
    *("llava_pixtral", "qwen2_vl", "qwen2_5_vl", "glm4v", "kimi_k25"),
    *("llava_next", "llava_onevision"),
)
"""Families whose images may differ in size within one batch (`image_sizes` of `inputs`)."""

Size = tuple[int, int]
_DEFAULT_SIZES: dict[str, Size] = {
    "pixtral": (4, 6),
    "qwen2_vl": (8, 12),
    "qwen2_5_vl": (8, 12),
    "glm4v": (8, 12),
    "kimi_k25": (8, 12),
    "llava_next": (3, 8),
    "llava_onevision": (3, 8),
}
_ANYRES = ("llava_next", "llava_onevision")
_PATCHED = ("qwen2_vl", "qwen2_5_vl", "glm4v", "kimi_k25")


@dataclass(frozen=True)
class Prompt:
    """One row of a batch: the number of images and the number of text tokens around them.

    The text tokens include the leading begin-of-sequence token and exclude the markers of images.
    """

    images: int
    text: int


def build(
    family: str,
    *,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A tiny random model of `family`, in eval mode; equal seeds give equal weights."""
    config = {**configs.CONFIGS, **configs.UNSUPPORTED_CONFIGS}[family]()
    return _build(AutoModelForImageTextToText, config, seed, attn_implementation, dtype)


def text_only(
    *,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A tiny random language model that takes no images."""
    return _build(AutoModelForCausalLM, configs.text_config(), seed, attn_implementation, dtype)


def _build(
    auto: type, config: PreTrainedConfig, seed: int, attn_implementation: str, dtype: torch.dtype
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation=attn_implementation, dtype=dtype)
        _randomise(model)
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Give all weights a scale at which logits react clearly to the visual tokens."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        if parameter.ndim < 2:
            parameter.add_((0.1 * noise).to(parameter.dtype))
        else:
            parameter.copy_(0.15 * noise)
    if model.config.get_text_config().model_type == "gemma":  # it multiplies them when it embeds
        model.get_input_embeddings().weight.div_(math.sqrt(configs.TEXT_WIDTH))


def special_ids(model: PreTrainedModel) -> list[int]:
    """Ids to suppress in `generate`: padding, sequence ends, image placeholders and markers."""
    vocab = model.config.get_text_config().vocab_size
    return [i for i in range(vocab) if not configs.FIRST_TEXT_ID <= i <= configs.LAST_TEXT_ID]


def tokens_per_image(
    model: PreTrainedModel, image_sizes: Sequence[Size] | None = None
) -> int | list[int]:
    """Number of placeholders of an image of the default size, or of one per size in patches."""
    if image_sizes is None:
        return _tokens(model, _default_size(model))
    return [_tokens(model, size) for size in image_sizes]


def inputs(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    padding: Literal["left", "right"] = "left",
    image_sizes: Sequence[Size] | None = None,
) -> dict[str, Tensor]:
    """What the processor of the family returns for a batch of prompts with random contents.

    `image_sizes` gives the height and width in patches of each image of the batch, in order; only
    families in `RAGGED_GRID_FAMILIES` take it.
    """
    sizes = _sizes(model, sum(prompt.images for prompt in prompts), image_sizes)
    generator = torch.Generator().manual_seed(seed)
    remaining = iter(sizes)
    rows = [_row(model, prompt, remaining, generator) for prompt in prompts]
    batch = _pad(rows, padding)
    batch.update(_token_types(model, batch["input_ids"]))
    if sizes:
        batch.update(_pixels(model, sizes, generator))
    return batch


def _kind(model: PreTrainedModel) -> str:
    """The model type, or the type of the tower where that decides on the inputs."""
    tower = model.config.vision_config.model_type
    return tower if tower == "pixtral" else model.config.model_type


def _default_size(model: PreTrainedModel) -> Size:
    if (kind := _kind(model)) in _DEFAULT_SIZES:
        return _DEFAULT_SIZES[kind]
    tower = model.config.vision_config
    return (tower.image_size // tower.patch_size,) * 2


def _merge_size(model: PreTrainedModel) -> int:
    """Side of the square of patches that becomes one token."""
    tower = model.config.vision_config
    return {
        "qwen2_vl": lambda: tower.spatial_merge_size,
        "qwen2_5_vl": lambda: tower.spatial_merge_size,
        "glm4v": lambda: tower.spatial_merge_size,
        "kimi_k25": lambda: tower.merge_kernel_size[0],
        "ovis2": lambda: tower.hidden_stride,
        "aya_vision": lambda: model.config.downsample_factor,
        "cohere2_vision": lambda: model.config.downsample_factor,
    }.get(_kind(model), lambda: 1)()


def _tokens(model: PreTrainedModel, size: Size) -> int:
    """Placeholders of one image; of AnyRes images as many as the model packs."""
    if _kind(model) not in _ANYRES:
        return math.prod(_llm_grid(model, size))
    tower = model.config.vision_config
    side = tower.image_size // tower.patch_size
    pixels = torch.tensor([size]) * tower.patch_size
    views = torch.zeros(_views(model, size), side * side, 1)
    packing = {"vision_feature_select_strategy": "default"}
    if _kind(model) == "llava_onevision":
        packing = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    newline = torch.zeros(1)
    (rows,), _ = model.model.pack_image_features([views], pixels, image_newline=newline, **packing)
    return len(rows)


def _views(model: PreTrainedModel, size: Size) -> int:
    """Passes of the tower for an AnyRes image of a size in patches."""
    tower = model.config.vision_config
    count = sys.modules[type(model).__module__].image_size_to_num_patches
    pixels = [side * tower.patch_size for side in size]
    return count(pixels, model.config.image_grid_pinpoints, tower.image_size)


def _llm_grid(model: PreTrainedModel, size: Size) -> Size:
    merge = _merge_size(model)
    if size[0] % merge or size[1] % merge:
        raise ValueError(f"an image of {size} patches does not divide into blocks of {merge}")
    return size[0] // merge, size[1] // merge


def _sizes(model: PreTrainedModel, count: int, image_sizes: Sequence[Size] | None) -> list[Size]:
    if image_sizes is None:
        return [_default_size(model)] * count
    if _kind(model) not in _DEFAULT_SIZES:
        raise ValueError(f"images of {_kind(model)} have one size")
    if len(image_sizes) != count:
        raise ValueError(f"{len(image_sizes)} sizes for {count} images")
    return [tuple(size) for size in image_sizes]


def _row(
    model: PreTrainedModel, prompt: Prompt, sizes: Iterator[Size], generator: torch.Generator
) -> list[int]:
    if prompt.text < 1:
        raise ValueError("a prompt ends with text")
    text = torch.randint(
        configs.FIRST_TEXT_ID, configs.LAST_TEXT_ID + 1, (prompt.text,), generator=generator
    ).tolist()
    text[0] = configs.BOS
    images = [_image_ids(model, size) for size in itertools.islice(sizes, prompt.images)]
    if _kind(model) == "paligemma":  # images first, then the begin of the sequence
        return [*itertools.chain(*images), *text]
    step = prompt.text // (prompt.images + 1)
    row = []
    for index, image in enumerate(images):
        row += text[index * step : (index + 1) * step] + image
    return row + text[prompt.images * step :]


def _image_ids(model: PreTrainedModel, size: Size) -> list[int]:
    """The ids that stand for one image: placeholders and the markers of the family."""
    run = [configs.IMAGE] * _tokens(model, size)
    match _kind(model):
        case "llava" | "vipllava" | "paligemma" | "llava_next" | "llava_onevision":
            return run
        case "pixtral":
            height, width = _llm_grid(model, size)
            rows = ([configs.IMAGE] * width + [configs.BREAK]) * height
            return [*rows[:-1], configs.END]
        case "ovis2":
            start, grid, _, _, end = configs.INDICATORS
            return [start, *run, grid, end]
        case "aya_vision":
            return [configs.START, configs.TILE, *run, configs.END]
        case "cohere2_vision":
            return [configs.START, *run, configs.BREAK, configs.END]
    return [configs.START, *run, configs.END]


def _pad(rows: list[list[int]], padding: str) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), configs.PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        span = slice(length - len(row), length) if padding == "left" else slice(len(row))
        ids[index, span] = torch.tensor(row)
        mask[index, span] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _token_types(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    match _kind(model):
        case "paligemma":  # zero: prefix, one: suffix
            return {"token_type_ids": torch.zeros_like(ids)}
        case "qwen2_vl" | "qwen2_5_vl" | "glm4v":
            return {"mm_token_type_ids": (ids == configs.IMAGE).long()}
    return {}


def _pixels(
    model: PreTrainedModel, sizes: Sequence[Size], generator: torch.Generator
) -> dict[str, Tensor]:
    kind, tower = _kind(model), model.config.vision_config
    if kind in _ANYRES:
        views = [_views(model, size) for size in sizes]
        shape = (len(sizes), max(views), 3, tower.image_size, tower.image_size)
        pixels = torch.randn(shape, generator=generator)
        for image, count in zip(pixels, views, strict=True):
            image[count:] = 0  # the processor pads missing tiles
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes) * tower.patch_size}
    height, width = (max(side) for side in zip(*sizes, strict=True))
    if kind not in _PATCHED:
        shape = (len(sizes), 3, height * tower.patch_size, width * tower.patch_size)
        pixels = {"pixel_values": torch.randn(shape, generator=generator)}
        if kind == "pixtral":
            pixels["image_sizes"] = torch.tensor(sizes) * tower.patch_size
        return pixels
    patches = sum(map(math.prod, sizes))
    patch = (3, tower.patch_size, tower.patch_size)
    if kind != "kimi_k25":
        patch = (math.prod(patch) * tower.temporal_patch_size,)
    return {
        "pixel_values": torch.randn((patches, *patch), generator=generator),
        "image_grid_thw": torch.tensor([(1, *size) for size in sizes]),
    }
