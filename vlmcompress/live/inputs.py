"""The caller's arguments, cut to the columns that stay."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.core.placement import Placement, edge_padding, place
from vlmcompress.live.encode import PIXEL_ARGUMENTS, encoder_arguments
from vlmcompress.live.encoded import Encoded

#: Arguments that run along `input_ids`, with what padding gets.
ALIGNED = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}


def by_name(forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional arguments joined to keyword arguments by the signature of `forward`."""
    names = [name for name in inspect.signature(forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def require_ids(call: Mapping[str, Any]) -> Tensor:
    """The call's `input_ids`.

    Raises:
        UnsupportedInputError: when the call brings embeddings instead.
    """
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor):
        raise UnsupportedInputError(
            "Images came without input_ids (inputs_embeds alone); pass input_ids, whose "
            "placeholders tell where the images are."
        )
    return ids


def prompt_placement(
    model: nn.Module, call: Mapping[str, Any], encoded: Encoded, *, generating: bool
) -> Placement:
    """Where the kept tokens of `encoded` lie in the prompt of `call`.

    Raises:
        UnsupportedInputError: when the call brings embeddings instead of ids.
        PlaceholderMismatchError: when images and placeholders do not match.
    """
    ids = require_ids(call)
    mask = call.get("attention_mask")
    padding = edge_padding(mask) if isinstance(mask, Tensor) and mask.ndim == 2 else None
    left = generating or (padding is not None and bool(padding[:, 0].any()))
    config: Any = model.config
    placeholders: Tensor = torch.eq(ids, config.image_token_id)
    return place(
        placeholders,
        encoded.lengths,
        encoded.kept,
        padding=padding,
        side="left" if left else "right",
    )


def shorten(
    model: Any,
    call: Mapping[str, Any],
    placement: Placement,
    position_ids: Tensor | None,
    output: Any,
) -> dict[str, Any]:
    """The call with every aligned tensor cut by one index and its images encoded."""
    short = cut(model, call, placement)
    short["attention_mask"] = _mask(call.get("attention_mask"), placement)
    short.pop("position_ids", None)
    if position_ids is not None:
        short["position_ids"] = position_ids
    return {**short, "mm_encoder_outputs": {"image": output}}


def cut(model: Any, call: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """The call without image arguments, its ids and what runs along them cut by one placement."""
    images = encoder_arguments(model.base_model, call)
    short = {name: value for name, value in call.items() if name not in images}
    short["input_ids"] = placement.take(call["input_ids"], pad_id(model))
    for name, fill in ALIGNED.items():
        if isinstance(call.get(name), Tensor) and call[name].shape[-1] == placement.length:
            short[name] = placement.take(call[name], fill)
    return short


def _mask(mask: Any, placement: Placement) -> Tensor:
    """Always a mask: without one, gapped positions would be read as packed sequences."""
    if mask is None:
        return placement.valid.long()
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UnsupportedInputError(
            f"attention_mask is {type(mask).__name__}; give a [batch, length] or "
            "[batch, heads, length, length] tensor."
        )
    if mask.ndim == 2:
        return placement.take(mask, 0)
    fill = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return placement.take_square(mask, fill)


def pad_id(model: nn.Module) -> int:
    """The id that padding columns get; masked out, so any valid one will do."""
    config = getattr(model, "generation_config", None)
    pad = getattr(config, "pad_token_id", None)
    pad = getattr(model.config, "pad_token_id", None) if pad is None else pad  # type: ignore[union-attr]
    return 0 if pad is None or pad < 0 else int(pad)


def without_pixels(model: nn.Module, call: Mapping[str, Any], output: Any) -> dict[str, Any]:
    """The call with its pixels replaced by encoder outputs and everything else as it was."""
    kept = {k: v for k, v in call.items() if k not in PIXEL_ARGUMENTS}
    return {
        **kept,
        "mm_encoder_outputs": {**(call.get("mm_encoder_outputs") or {}), "image": output},
    }
