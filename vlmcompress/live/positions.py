"""Position ids of shortened prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmcompress.core.placement import Placement
from vlmcompress.families import Family

Mode = Literal["original", "contiguous"]


def resolve(positions: str, family: Family) -> Mode:
    """`auto` is contiguous for 1-D RoPE and original for M-RoPE."""
    if positions == "auto":
        return "original" if family.rope == "mrope" else "contiguous"
    return positions  # type: ignore[return-value]


def shortened(
    model: nn.Module,
    family: Family,
    call: Mapping[str, Any],
    placement: Placement,
    mode: Mode,
    *,
    generating: bool,
) -> Tensor | None:
    """Position ids for the short prompt, None where the model's own default is the right one.

    Args:
        model: the outer model.
        family: its facts.
        call: the caller's arguments, full length.
        placement: the columns that stay.
        mode: resolved position mode.
        generating: whether the ids go to `generate` (whose conventions differ) or to a forward.

    Returns:
        [B, L'] or, for M-RoPE, [3 or 4, B, L'].
    """
    given = call.get("position_ids")
    if mode == "contiguous" and given is None and family.rope == "1d":
        return None
    full = _full(model, family, call, generating=generating) if given is None else given
    if full.ndim == 2 and full.shape[0] == 1:
        full = full.expand(placement.index.shape[0], -1)
    if mode == "original":
        return placement.take(full, 0)
    if family.rope == "mrope":
        text = placement.valid.long().cumsum(-1) - 1
        return text.masked_fill(~placement.valid, 0).expand(full.shape[0], -1, -1)
    return (placement.take(full, 0) - placement.dropped_before()).masked_fill(~placement.valid, 0)


def _full(model: nn.Module, family: Family, call: Mapping[str, Any], *, generating: bool) -> Tensor:
    """The position ids the unpatched model would use for the caller's prompt."""
    ids: Tensor = call["input_ids"]
    if generating:
        kwargs = {k: v for k, v in call.items() if k != "input_ids"}
        return model._prepare_position_ids_for_generation(ids, kwargs)  # type: ignore[operator,no-any-return]
    default = torch.arange(ids.shape[1], device=ids.device) + family.position_offset
    if family.rope == "1d":
        return default.expand_as(ids)
    full = rotary(model, call)
    return default.expand(3, *ids.shape) if full is None else full


def rotary(model: Any, call: Mapping[str, Any]) -> Tensor | None:
    """[3, B, L] the M-RoPE positions of a plain forward, None where the call has no images."""
    return of_prompt(model.base_model, call)


def of_prompt(base: Any, call: Mapping[str, Any]) -> Tensor | None:
    """The same of the model without its head."""
    ids: Tensor = call["input_ids"]
    names = ("image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids")
    found: Tensor | None = base.compute_3d_position_ids(
        input_ids=ids,
        # Only its shape is read.
        inputs_embeds=ids.new_empty((*ids.shape, 0), dtype=torch.float32),
        past_key_values=None,
        **{name: call.get(name) for name in names},
    )
    return found


def next_position(positions: Tensor | None, placement: Placement) -> Tensor | None:
    """[B] position of the first token after the prompt; None where the model counts rightly."""
    if positions is None:
        return None
    columns = torch.arange(placement.short_length, device=placement.index.device)
    last = torch.where(placement.valid, columns, -1).amax(1)
    rows = positions.expand(placement.index.shape[0], -1) if positions.ndim == 2 else positions
    at_last = rows.gather(-1, last.expand(rows.shape[:-1])[..., None])[..., 0]
    # Of M-RoPE's four rows in `generate` the first counts text columns and rotates nothing.
    return (at_last if at_last.ndim == 1 else at_last[-3:].amax(0)) + 1
