"""Later turns over a cache that was filled from a shortened prompt.

The cache carries which columns of the conversation it holds. The caller goes on as with an
uncompressed
model: `generate` gets the ids of the whole conversation, a forward only what is new; images that
    come with
the new turn are compressed like the first.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmcompress.core.errors import CacheMismatchError, PlaceholderMismatchError
from vlmcompress.core.placement import Placement, place
from vlmcompress.live import inputs, positions
from vlmcompress.live.encoded import Encoded

#: The attribute of a cache that was filled from a shortened prompt.
ATTRIBUTE = "_vlmcompress"


@dataclass(frozen=True)
class CacheRecord:
    """What a cache knows of the conversation it holds.

    Attributes:
        placement: columns of the conversation's first L ids that are in the cache.
        mode: resolved position mode; it holds for the whole conversation.
        next_position: [B] position of the first token after these ids, None if it is L'.
        ids: [B, L] the ids, -1 where they are not known.
        model: whose cache it is.
    """

    placement: Placement
    mode: positions.Mode
    next_position: Tensor | None
    ids: Tensor
    model: weakref.ref[Any]


def record_of(cache: Any) -> CacheRecord | None:
    """What a cache knows; None of caches that no shortened prompt went into."""
    return getattr(cache, ATTRIBUTE, None)


def mark(cache: Any, record: CacheRecord | None) -> None:
    """Let a cache carry how it was shortened."""
    if cache is not None and record is not None and hasattr(cache, "get_seq_length"):
        setattr(cache, ATTRIBUTE, record)


@dataclass(frozen=True)
class Turn:
    """A later turn, placed.

    Attributes:
        whole: placement of all ids so far, of which `held` short columns are in the cache.
        new: placement of the new columns alone.
        first_new: the first column of the conversation that is not in the cache.
        short_held: short columns in the cache.
    """

    whole: Placement
    new: Placement
    first_new: int
    short_held: int


def columns_held(record: CacheRecord, cache: Any, model: Any, batch: int) -> int:
    """How many of the conversation's columns are in the cache.

    Raises:
        CacheMismatchError: for a cache of another model or batch, or one that was cropped.
    """
    held, prompt = cache.get_seq_length(), record.placement
    if record.model() is not model:
        raise CacheMismatchError(
            f"The cache was filled by another model than this {type(model).__name__}; a cache goes "
            "with the model that returned it."
        )
    if held < prompt.short_length:
        raise CacheMismatchError(
            f"The cache holds {held} tokens but was filled with {prompt.short_length}; it was "
            "cropped or reset. Start again without it."
        )
    if batch != prompt.index.shape[0]:
        raise CacheMismatchError(
            f"The cache was filled by {prompt.index.shape[0]} rows, the call has {batch}."
        )
    return prompt.length + held - prompt.short_length


def check_ids(record: CacheRecord, ids: Tensor, held: int) -> None:
    """The ids of a later turn must begin with those the cache was filled from.

    Raises:
        CacheMismatchError: when they are shorter, or differ (another conversation, re-ordered
            rows).
    """
    length = record.placement.length
    if ids.shape[1] <= held:
        raise CacheMismatchError(
            f"The ids have {ids.shape[1]} columns and the cache holds {held} of the conversation; "
            "a returned cache goes with the full ids it was made from and what follows them."
        )
    first = ids[:, :length].to(record.ids.device)
    differ = ((first != record.ids) & (record.ids >= 0)).any(1)
    if differ.any():
        rows = differ.nonzero()[:, 0].tolist()
        raise CacheMismatchError(
            f"Row(s) {rows} of the ids do not begin with the {length} ids the cache was filled "
            "from: another conversation, or rows in another order."
        )


def place_turn(
    model: Any, record: CacheRecord, cache: Any, new_ids: Tensor, held: int, encoded: Encoded | None
) -> Turn:
    """Where the new columns go, with the images that came along.

    Args:
        model: the outer model.
        record: what the cache knows.
        cache: the cache.
        new_ids: [B, q] the columns that are not in the cache.
        held: columns of the conversation in the cache.
        encoded: images of the call; all of the conversation's or the new ones.
    """
    before = record.placement.grown(held)
    placeholders = torch.eq(new_ids, model.config.image_token_id)
    lengths, kept = ((), ()) if encoded is None else _new_images(encoded, int(placeholders.sum()))
    if encoded is None:
        placeholders = torch.zeros_like(placeholders)
    new = place(placeholders, lengths, kept, side="left")
    return Turn(before.join(new), new, held, cache.get_seq_length())


def _new_images(encoded: Encoded, wanted: int) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    if sum(encoded.lengths) != wanted:
        raise PlaceholderMismatchError(
            f"The new turn has {wanted} image placeholders but the images give "
            f"{sum(encoded.lengths)} "
            f"tokens ({len(encoded.lengths)} images); send only the images of the new turn with a "
            "returned cache."
        )
    return encoded.lengths, encoded.kept


def generate_turn(
    model: Any, family: Any, call: dict[str, Any], record: CacheRecord, encoded: Encoded | None
) -> tuple[dict[str, Any], Turn, CacheRecord]:
    """A later turn of `generate`, which gets the ids of the whole conversation.

    Returns:
        The short arguments, the placed turn, and what the cache will know.
    """
    ids, cache = call["input_ids"], call["past_key_values"]
    held = columns_held(record, cache, model, len(ids))
    check_ids(record, ids, held)
    turn = place_turn(model, record, cache, ids[:, held:], held, encoded)
    arguments = _shortened(model, call, turn.whole, encoded)
    mask = turn.whole.take(call["attention_mask"], 0)
    arguments["attention_mask"] = mask
    where: Tensor | None = None
    if family.rope == "mrope":
        new = _new_positions(model, family, _tail(call, held), turn, record)
        past = new.new_zeros(3, len(ids), turn.short_held)
        text = (mask.cumsum(-1) - 1).clamp(min=0)[None]
        where = torch.cat([text, torch.cat([past, new], -1)])
    elif record.mode == "original":
        where = turn.whole.take((call["attention_mask"].cumsum(-1) - 1).clamp(min=0), 0)
    if where is not None:
        arguments["position_ids"] = where
    following = positions.next_position(where, turn.whole)
    following = None if following is None else following + family.position_offset
    grown = replace(record, placement=turn.whole, next_position=following, ids=ids)
    return arguments, turn, grown


def forward_turn(
    model: Any, family: Any, call: dict[str, Any], record: CacheRecord, encoded: Encoded | None
) -> tuple[dict[str, Any], Turn, CacheRecord]:
    """A later turn of a plain forward, which gets only what is new.

    Returns:
        The short arguments, the placed turn, and what the cache will know.
    """
    ids, cache = call.get("input_ids"), call["past_key_values"]
    known = ids is not None
    if ids is None:
        ids = torch.full(call["inputs_embeds"].shape[:2], -1, device=record.ids.device)
    held = columns_held(record, cache, model, len(ids))
    turn = place_turn(model, record, cache, ids, held, encoded)
    arguments = _shortened(model, call, turn.new, encoded) if known else dict(call)
    mask = call.get("attention_mask")
    if mask is not None and mask.shape[-1] == turn.whole.length != turn.whole.short_length:
        arguments["attention_mask"] = turn.whole.take(mask, 0)
    elif mask is None and not bool(turn.whole.valid.all()):
        arguments["attention_mask"] = turn.whole.valid.long()
    where = _forward_positions(model, family, {**call, "input_ids": ids}, turn, record)
    if where is not None:
        arguments["position_ids"] = where
    following = positions.next_position(where, turn.new)
    unknown = ids.new_full((len(ids), held - record.placement.length), -1)
    so_far = torch.cat([record.ids.to(ids.device), unknown, ids], 1)
    return (
        arguments,
        turn,
        replace(record, placement=turn.whole, next_position=following, ids=so_far),
    )


def plain_record(
    model: Any, family: Any, cache: Any, mode: positions.Mode, like: Tensor
) -> CacheRecord:
    """A record for a cache of uncompressed turns, so that a later image can be compressed.

    Args:
        model: the outer model.
        family: its facts.
        cache: the cache.
        mode: resolved position mode.
        like: the ids of the call, for batch and device; parameters may be offloaded.
    """
    batch, device = len(like), like.device
    held = cache.get_seq_length()
    ids = torch.full((batch, held), -1, device=device)
    deltas = getattr(model.base_model, "rope_deltas", None)
    following = None
    if family.rope == "mrope":
        following = (
            held + (torch.zeros(batch, device=device) if deltas is None else deltas[:, 0]).long()
        )
    placement = Placement.everything(batch, held, device)
    return CacheRecord(placement, mode, following, ids, weakref.ref(model))


def _forward_positions(
    model: Any, family: Any, call: Mapping[str, Any], turn: Turn, record: CacheRecord
) -> Tensor | None:
    given = call.get("position_ids")
    if given is None:
        counts_itself = record.next_position is None and bool(turn.new.valid.all())
        if counts_itself and record.mode == "contiguous":
            return None
        return _new_positions(model, family, call, turn, record)
    if record.mode == "original":
        return turn.new.take(given, 0)
    if family.rope == "mrope":
        return _new_positions(model, family, call, turn, record)
    return turn.new.take(given, 0) - turn.whole.dropped_before()[:, turn.short_held :]


def _new_positions(
    model: Any, family: Any, call: Mapping[str, Any], turn: Turn, record: CacheRecord
) -> Tensor:
    """Positions of the new columns, which `call` holds: [B, q'] or for M-RoPE [3, B, q']."""
    ids: Tensor = call["input_ids"]
    following = record.next_position
    if following is None:
        following = torch.full((len(ids),), record.placement.short_length)
    start = following.to(ids.device)[:, None] + (turn.first_new - record.placement.length)
    if record.mode == "contiguous":
        where = (turn.new.valid.long().cumsum(-1) - 1).clamp(min=0) + start
        return where.expand(3, -1, -1) if family.rope == "mrope" else where
    later = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if family.rope == "mrope":
        rotary = positions.rotary(model, {**call, "attention_mask": None})
        later = later.expand(3, -1, -1) if rotary is None else rotary
    return turn.new.take(later, 0) + start


def _tail(call: Mapping[str, Any], held: int) -> dict[str, Any]:
    """The call's columns that are not in the cache."""
    names = ("input_ids", *inputs.ALIGNED)
    cut = {n: call[n][..., held:] for n in names if isinstance(call.get(n), Tensor)}
    return {**call, **cut}


def _shortened(
    model: Any, call: Mapping[str, Any], placement: Placement, encoded: Encoded | None
) -> dict[str, Any]:
    """The call cut by one placement, its pixels turned into features where there are any."""
    out = inputs.cut(model, call, placement)
    return out if encoded is None else {**out, "mm_encoder_outputs": {"image": encoded.output}}
