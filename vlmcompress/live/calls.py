"""One compressed call: encode, place, shorten, and what is remembered of it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmcompress.core.costs import prefill_flops
from vlmcompress.core.errors import CacheMismatchError, UnsupportedInputError
from vlmcompress.core.placement import Placement
from vlmcompress.core.report import CallRecord
from vlmcompress.live import inputs, positions
from vlmcompress.live.encode import CompressedEncoding, Encoded, Encoder, fresh_output, has_pixels
from vlmcompress.live.state import CACHE_ATTRIBUTE, State
from vlmcompress.live.timing import Stopwatch


@dataclass(frozen=True)
class CacheRecord:
    """How a cache came to be shorter than the prompt; it lives on the cache object.

    Attributes:
        placement: columns of the first prompt that are in the cache.
        mode: resolved position mode.
        next_position: [B] position of the first token after the prompt, None if it is L'.
    """

    placement: Placement
    mode: positions.Mode
    next_position: Tensor | None


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
    return Encoder(state.family, base, state.settings.pipeline, watch).encode(call)


def prepare(model: nn.Module, state: State, call: dict[str, Any], *, generating: bool) -> ShortCall:
    """Encode the images of `call` and cut everything that runs along its ids."""
    cache = call.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UnsupportedInputError(
            "The call brings new images together with a filled past_key_values; send the whole "
            "conversation "
            "without the cache."
        )
    watch = Stopwatch(inputs.require_ids(call).device)
    encoded = encode(model, state, call, watch)
    mode = positions.resolve(state.settings.pipeline.config.positions, state.family)
    placement = inputs.prompt_placement(model, call, encoded, generating=generating)
    if not encoded.compressed:
        arguments = inputs.without_pixels(model, call, encoded.output)
        return ShortCall(
            arguments, None, None, _record(model, state, encoded, None, call, mode, watch), watch
        )
    ids = positions.shortened(model, state.family, call, placement, mode, generating=generating)
    arguments = inputs.shorten(model, call, placement, ids)
    arguments["mm_encoder_outputs"] = {"image": encoded.output}
    following = positions.next_position(ids, placement)
    if generating and following is not None:
        following = following + state.family.position_offset
    _set_rope_deltas(model, state, following, placement)
    cache_record = CacheRecord(placement, mode, following)
    record = _record(model, state, encoded, placement, call, mode, watch)
    return ShortCall(arguments, placement, cache_record, record, watch)


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
    batch, length = call["input_ids"].shape
    short = length if placement is None else placement.short_length
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


def cache_record(cache: Any) -> CacheRecord | None:
    """What a cache knows about its shortened prompt."""
    return getattr(cache, CACHE_ATTRIBUTE, None)


def mark_cache(cache: Any, record: CacheRecord | None) -> None:
    """Let a cache carry how it was shortened."""
    if cache is not None and record is not None and hasattr(cache, "get_seq_length"):
        setattr(cache, CACHE_ATTRIBUTE, record)


def check_cache(cache: Any, record: CacheRecord, width: int) -> None:
    """Refuse caches that cannot hold what their record says.

    Raises:
        CacheMismatchError: when the cache was cropped or re-ordered, or the ids are not its
            prompt's.
    """
    held, prompt = cache.get_seq_length(), record.placement
    if held < prompt.short_length:
        raise CacheMismatchError(
            f"The cache holds {held} tokens but was filled with {prompt.short_length}; it was "
            "cropped or "
            "reset. Start again without it."
        )
    if width < prompt.length:
        raise CacheMismatchError(
            f"The ids have {width} columns, the cache's prompt had {prompt.length}; a returned "
            "cache goes "
            "with the full ids it was made from and what follows them."
        )
