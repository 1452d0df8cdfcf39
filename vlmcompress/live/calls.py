"""One compressed call: encode, place, shorten, and what is remembered of it."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmcompress.core.costs import prefill_flops
from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.core.placement import Placement
from vlmcompress.core.report import CallRecord
from vlmcompress.live import conversation, inputs, positions
from vlmcompress.live.conversation import CacheRecord
from vlmcompress.live.encode import CompressedEncoding, Encoded, Encoder, fresh_output, has_pixels
from vlmcompress.live.state import State
from vlmcompress.live.timing import Stopwatch


@dataclass(frozen=True)
class ShortCall:
    """A call ready for the language model.

    Attributes:
        arguments: what the model gets instead of the caller's arguments.
        placement: columns that stay; None when nothing was dropped.
        cache: what the cache will carry; None when nothing was dropped.
        record: what the handle remembers.
        watch: the stage clock.
    """

    arguments: dict[str, Any]
    placement: Placement | None
    cache: CacheRecord | None
    record: CallRecord
    watch: Stopwatch


def carries_images(call: Mapping[str, Any]) -> bool:
    """Whether a call brings pixels or an encoding made by `Handle.encode`."""
    given = call.get("mm_encoder_outputs")
    if has_pixels(call) or isinstance(given, CompressedEncoding):
        return True
    if given:
        warnings.warn(
            "mm_encoder_outputs that were not made by handle.encode(...) are used as they are, "
            "uncompressed.",
            stacklevel=2,
        )
    return False


def encode(model: nn.Module, state: State, call: Mapping[str, Any], watch: Stopwatch) -> Encoded:
    """Compressed tokens of the images of `call`, or those that it brings along."""
    given = call.get("mm_encoder_outputs")
    if isinstance(given, CompressedEncoding):
        if has_pixels(call):
            raise UnsupportedInputError("Give either pixels or mm_encoder_outputs, not both.")
        output = fresh_output(given.encoded.output)
        return dataclasses.replace(given.encoded, output=output)
    base: nn.Module = model.base_model  # type: ignore[assignment]
    if state.evidence is not None:
        tower = state.family.tower(base)
        assert tower is not None  # evidence hooks exist only then
        state.evidence.refresh(tower.layers(state.family.tower_module(base)))
    pipeline = state.settings.pipeline
    if not state.active:
        pipeline = dataclasses.replace(pipeline, stages=())
    return Encoder(state.family, base, pipeline, watch).encode(call)


def prepare(model: nn.Module, state: State, call: dict[str, Any], *, generating: bool) -> ShortCall:
    """Encode the images of `call` and cut everything that runs along its ids."""
    watch = Stopwatch(inputs.require_ids(call).device)
    encoded = encode(model, state, call, watch)
    cache = call.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return _prepare_later(model, state, call, encoded, watch, generating)
    return _prepare_first(model, state, call, encoded, watch, generating)


def _prepare_first(
    model: nn.Module,
    state: State,
    call: dict[str, Any],
    encoded: Encoded,
    watch: Stopwatch,
    generating: bool,
) -> ShortCall:
    mode = positions.resolve(state.settings.pipeline.config.positions, state.family)
    placement = inputs.prompt_placement(model, call, encoded, generating=generating)
    if not encoded.compressed:
        arguments = inputs.without_pixels(model, call, encoded.output)
        record = _record(model, state, encoded, None, call, mode, watch)
        return ShortCall(arguments, None, None, record, watch)
    ids = positions.shortened(model, state.family, call, placement, mode, generating=generating)
    arguments = inputs.shorten(model, call, placement, ids)
    arguments["mm_encoder_outputs"] = {"image": encoded.output}
    following = positions.next_position(ids, placement)
    if generating and following is not None:
        following = following + state.family.position_offset
    _set_rope_deltas(model, state, following, placement)
    known = CacheRecord(placement, mode, following, call["input_ids"], weakref.ref(model))
    record = _record(model, state, encoded, placement, call, mode, watch)
    return ShortCall(arguments, placement, known, record, watch)


def _prepare_later(
    model: nn.Module,
    state: State,
    call: dict[str, Any],
    encoded: Encoded,
    watch: Stopwatch,
    generating: bool,
) -> ShortCall:
    """A later turn that brings images of its own."""
    cache, ids = call["past_key_values"], call["input_ids"]
    known = conversation.record_of(cache)
    if known is None:
        mode = positions.resolve(state.settings.pipeline.config.positions, state.family)
        known = conversation.plain_record(model, state.family, cache, mode, len(ids))
    turn_of = conversation.generate_turn if generating else conversation.forward_turn
    arguments, turn, grown = turn_of(model, state.family, call, known, encoded)
    _set_rope_deltas(model, state, grown.next_position, turn.whole)
    record = _record(model, state, encoded, turn.whole, call, known.mode, watch)
    cut = turn.whole if generating else turn.new
    return ShortCall(arguments, cut, grown, record, watch)


def _set_rope_deltas(
    model: nn.Module, state: State, following: Tensor | None, placement: Placement
) -> None:
    """Let M-RoPE models that count on from the cache length arrive at the right position."""
    if state.family.rope == "mrope" and following is not None:
        model.base_model.rope_deltas = (following - placement.short_length)[:, None]  # type: ignore[union-attr]


def _record(
    model: nn.Module,
    state: State,
    encoded: Encoded,
    placement: Placement | None,
    call: Mapping[str, Any],
    mode: positions.Mode,
    watch: Stopwatch,
) -> CallRecord:
    batch, given = call["input_ids"].shape
    length, short = (given, given)
    if placement is not None:
        length, short = placement.length, placement.short_length
    text = model.config.get_text_config()  # type: ignore[operator,union-attr]
    return CallRecord(
        method=state.settings.pipeline.config.to_spec(),
        positions=mode,
        tokens_before=encoded.lengths,
        tokens_after=tuple(len(rows) for rows in encoded.kept),
        kept=encoded.kept,
        assignments=encoded.assignments,
        grids=encoded.grids,
        batch=batch,
        prompt_length=length,
        short_length=short,
        token_index=None if placement is None else placement.index,
        layers=encoded.evidence_layers,
        skipped_layers=encoded.skipped_layers,
        prefill_flops=prefill_flops(text, short, batch),
        prefill_flops_before=prefill_flops(text, length, batch),
        clock=watch.seconds,
    )
