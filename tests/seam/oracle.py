"""Independent references: slow, plain, and without a line of the seam."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.tiny import Prompt

#: Rows with two images, one image and none, so that padded and mixed batches are always covered.
MIXED = (Prompt(images=2, text=7), Prompt(images=1, text=9), Prompt(images=0, text=6))
ONE = (Prompt(images=1, text=8),)


def greedy(model: Any, new_tokens: int = 5) -> dict[str, Any]:
    """Arguments of a greedy generate that never emits special ids."""
    return {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "suppress_tokens": tiny.special_ids(model),
    }


def features(model: Any, call: Mapping[str, Any]) -> list[Tensor]:
    """Uncompressed features of each image, from the unpatched model."""
    return list(encode(model, call).pooler_output)


def encode(model: Any, call: Mapping[str, Any]) -> Any:
    """What the unpatched `get_image_features` returns."""
    names = inspect.signature(model.base_model.get_image_features).parameters
    arguments = {k: v for k, v in call.items() if k in names}
    return model.base_model.get_image_features(**arguments, return_dict=True)


def drop_mask(
    model: Any, call: Mapping[str, Any], kept: Sequence[Tensor], lengths: Sequence[int]
) -> Tensor:
    """[B, L] attention mask of the full prompt with dropped visual tokens set to 0."""
    mask = call["attention_mask"].clone()
    unit, row_in_unit = 0, 0
    for b, ids in enumerate(call["input_ids"].tolist()):
        for column, token in enumerate(ids):
            if token != model.config.image_token_id:
                continue
            mask[b, column] = int(row_in_unit in kept[unit].tolist())
            row_in_unit += 1
            if row_in_unit == lengths[unit]:
                unit, row_in_unit = unit + 1, 0
    return mask


def default_positions(model: Any, call: Mapping[str, Any]) -> Tensor:
    """The position ids a plain forward of the unpatched model uses for the full prompt."""
    ids = call["input_ids"]
    if hasattr(model.base_model, "compute_3d_position_ids"):
        return model.base_model.compute_3d_position_ids(
            input_ids=ids,
            inputs_embeds=torch.empty(*ids.shape, 0),
            image_grid_thw=call.get("image_grid_thw"),
            video_grid_thw=None,
            attention_mask=call["attention_mask"],
            past_key_values=None,
            mm_token_type_ids=call["mm_token_type_ids"],
        )
    start = 1 if model.config.model_type == "paligemma" else 0
    return (torch.arange(ids.shape[1], device=ids.device) + start).expand_as(ids)


def masked_logits(
    model: Any, call: Mapping[str, Any], kept: Sequence[Tensor], lengths: Sequence[int]
) -> Tensor:
    """Logits of the full prompt, its positions kept, in which nobody attends to dropped tokens."""
    positions = default_positions(model, call)
    mask = drop_mask(model, call, kept, lengths)
    return model(**{**call, "attention_mask": mask, "position_ids": positions}).logits


def cut(
    model: Any, call: Mapping[str, Any], kept: Sequence[Tensor], short: Sequence[Tensor]
) -> dict[str, Any]:
    """A batch-1 prompt cut by hand: short ids, `short` features per image, no positions."""
    assert call["input_ids"].shape[0] == 1
    lengths = [len(f) for f in features(model, call)]
    keep = drop_mask(
        model, {**call, "attention_mask": torch.ones_like(call["input_ids"])}, kept, lengths
    )
    columns = keep[0].nonzero()[:, 0]
    output = encode(model, call)
    stackable = isinstance(output.pooler_output, Tensor)
    output.pooler_output = torch.stack(list(short)) if stackable else list(short)
    out = {
        "input_ids": call["input_ids"][:, columns],
        "attention_mask": torch.ones_like(columns)[None],
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in call:
            out[name] = call[name][:, columns]
    return {**out, "mm_encoder_outputs": {"image": output}}


def text_positions_like(model: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Explicit text positions for M-RoPE models, nothing for the others."""
    if not hasattr(model.base_model, "compute_3d_position_ids"):
        return {}
    length = call["input_ids"].shape[1]
    where = torch.arange(length, device=call["input_ids"].device)
    return {"position_ids": where.expand(3, 1, -1)}


def row(
    call: Mapping[str, Any], b: int, image_token_id: int, per_image: int | Sequence[int]
) -> dict[str, Any]:
    """Row `b` of a padded batch alone, without its padding and with its own images."""
    columns = call["attention_mask"][b].nonzero()[:, 0]
    counts = (call["input_ids"] == image_token_id).sum(1).tolist()
    n = per_image if isinstance(per_image, int) else per_image[0]
    first, images = sum(counts[:b]) // n, counts[b] // n
    aligned = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    out = {k: call[k][b : b + 1, columns] for k in aligned if k in call}
    if images == 0:
        return out
    if "image_grid_thw" in call:
        sizes = call["image_grid_thw"].prod(1).tolist()
        start, stop = sum(sizes[:first]), sum(sizes[: first + images])
        grids = call["image_grid_thw"][first : first + images]
        return {**out, "pixel_values": call["pixel_values"][start:stop], "image_grid_thw": grids}
    for name in ("pixel_values", "image_sizes"):
        if name in call:
            out[name] = call[name][first : first + images]
    return out
