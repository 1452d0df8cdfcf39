"""One compressed call: encode, place, shorten, and what is remembered of it."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmcompress.core.costs import layered_flops, prefill_flops
from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.core.placement import Placement
from vlmcompress.core.report import CallRecord
from vlmcompress.live import conversation, inputs, positions
from vlmcompress.live.conversation import CacheRecord
from vlmcompress.live.encode import Encoder, has_pixels
from vlmcompress.live.encoded import CompressedEncoding, Encoded, fresh_output
from vlmcompress.live.question import asked
from vlmcompress.live.state import State
from vlmcompress.live.timing import Stopwatch
from vlmcompress.methods.pipeline import LayerStage, Pipeline


@dataclass(frozen=True)
class ShortCall:
    """A call ready for the language model.

    Attributes:
        arguments: what the model gets instead of the caller's arguments.
        placement: columns that stay; None when nothing was dropped.
        cache: what the cache will carry; None when nothing was dropped.
        record: what the handle remembers.
        watch: the stage clock.
        layers: what acts inside the language model.
        encoded: the images; None where nothing is done to them at its entrance.
    """

    arguments: dict[str, Any]
    placement: Placement | None
    cache: CacheRecord | None
    record: CallRecord
    watch: Stopwatch
    layers: tuple[LayerStage, ...] = ()
    encoded: Encoded | None = None


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


def encode(
    model: Any,
    state: State,
    pipeline: Pipeline,
    call: Mapping[str, Any],
    watch: Stopwatch,
    *,
    generating: bool = False,
) -> Encoded:
    """Compressed tokens of the images of `call`, or those that it brings along.

    Args:
        model: the outer model.
        state: what `patch` put on it.
        pipeline: the methods.
        call: the caller's arguments.
        watch: the stage clock.
        generating: whether the ids of a later turn are those of the whole conversation.
    """
    given = call.get("mm_encoder_outputs")
    if isinstance(given, CompressedEncoding):
        if has_pixels(call):
            raise UnsupportedInputError("Give either pixels or mm_encoder_outputs, not both.")
        output = fresh_output(given.encoded.output)
        return dataclasses.replace(given.encoded, output=output, read=())
    base = model.base_model
    if state.evidence is not None:
        tower = state.family.tower(base)
        assert tower is not None  # evidence hooks exist only then
        state.evidence.refresh(tower.layers(state.family.tower_module(base)))
    held = _held(model, call) if generating else 0
    about, needs = None, pipeline.needs()
    if needs.asks:
        told = (state.clip, state.processor, state.question)
        about = asked(model, call, needs, *told, held=held)
    rows = []
    if pipeline.shares_prompts:
        new = inputs.require_ids(call)[:, held:]
        rows = torch.eq(new, model.config.image_token_id).sum(1).tolist()
    return Encoder(state.family, base, pipeline, watch, about, rows).encode(call)


def _held(model: Any, call: Mapping[str, Any]) -> int:
    """Columns of the conversation's ids in the call's cache; its images fill the others."""
    cache = call.get("past_key_values")
    if cache is None or cache.get_seq_length() == 0:
        return 0
    known = conversation.record_of(cache)
    if known is None:
        return int(cache.get_seq_length())
    return conversation.columns_held(known, cache, model, len(inputs.require_ids(call)))


def prepare(model: Any, state: State, call: dict[str, Any], *, generating: bool) -> ShortCall:
    """Encode the images of `call` and cut everything that runs along its ids."""
    pipeline = state.settings.pipeline
    if not state.active:
        pipeline = pipeline.switched_off()
    watch = Stopwatch(inputs.require_ids(call).device)
    encoded = encode(model, state, pipeline, call, watch, generating=generating)
    call = {name: value for name, value in call.items() if name != "question"}
    preparation = _Preparation(model, state, pipeline, call, encoded, watch, generating)
    cache = call.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return preparation.later_turn(cache)
    return preparation.first_turn()


@dataclass(frozen=True)
class _Preparation:
    """What one call is prepared from; the pipeline is that of its beginning."""

    model: Any
    state: State
    pipeline: Pipeline
    call: dict[str, Any]
    encoded: Encoded
    watch: Stopwatch
    generating: bool

    @property
    def _mode(self) -> positions.Mode:
        return positions.resolve(self.pipeline.config.positions, self.state.family)

    def first_turn(self) -> ShortCall:
        """A prompt without a past."""
        model, family, call, encoded = self.model, self.state.family, self.call, self.encoded
        generating = self.generating
        placement = inputs.prompt_placement(model, call, encoded, generating=generating)
        if not encoded.compressed:
            arguments = inputs.without_pixels(model, call, encoded.output)
            return self._short(arguments, None, None, self._record(None, self._mode))
        where = positions.shortened(
            model, family, call, placement, self._mode, generating=generating
        )
        arguments = inputs.shorten(model, call, placement, where, encoded.output)
        following = positions.next_position(where, placement)
        if generating and following is not None:
            following = following + family.position_offset
        self._set_rope_deltas(following, placement)
        ids = call["input_ids"]
        known = CacheRecord(placement, self._mode, following, ids, weakref.ref(model))
        record = self._record(placement, self._mode)
        return self._short(arguments, placement, known, record)

    def later_turn(self, cache: Any) -> ShortCall:
        """A later turn that brings images of its own."""
        model, family, call = self.model, self.state.family, self.call
        known = conversation.record_of(cache)
        if known is None:
            ids = call["input_ids"]
            known = conversation.plain_record(model, family, cache, self._mode, ids)
        turn_of = conversation.generate_turn if self.generating else conversation.forward_turn
        arguments, turn, grown = turn_of(model, family, call, known, self.encoded)
        self._set_rope_deltas(grown.next_position, turn.whole)
        record = self._record(turn.whole, known.mode)
        cut = turn.whole if self.generating else turn.new
        return self._short(arguments, cut, grown, record)

    def _short(
        self,
        arguments: dict[str, Any],
        placement: Placement | None,
        cache: CacheRecord | None,
        record: CallRecord,
    ) -> ShortCall:
        decoder = self.pipeline.decoder
        encoded = self.encoded if self.encoded.heard or self.encoded.whole else None
        return ShortCall(arguments, placement, cache, record, self.watch, decoder, encoded)

    def _set_rope_deltas(self, following: Tensor | None, placement: Placement) -> None:
        """Let M-RoPE models that count on from the cache length arrive at the right position."""
        if self.state.family.rope == "mrope" and following is not None:
            self.model.base_model.rope_deltas = (following - placement.short_length)[:, None]

    def _record(self, placement: Placement | None, mode: positions.Mode) -> CallRecord:
        encoded = self.encoded
        batch, given = self.call["input_ids"].shape
        length, short = (given, given)
        if placement is not None:
            length, short = placement.length, placement.short_length
        text = self.model.config.get_text_config()
        return CallRecord(
            method=self.pipeline.config.to_spec(),
            positions=mode,
            tokens_before=encoded.lengths,
            tokens_after=tuple(len(rows) for rows in encoded.kept),
            kept=encoded.kept,
            assignments=encoded.assignments,
            segments=encoded.segments,
            batch=batch,
            prompt_length=length,
            short_length=short,
            token_index=None if placement is None else placement.index,
            layers=encoded.evidence_layers,
            skipped_layers=encoded.skipped_layers,
            tower_patches=encoded.tower_patches,
            tower_keys=encoded.tower_keys,
            tower_run=encoded.tower_run,
            prefill_flops=_summed(prefill_flops(text, short, batch), *self._entrance(short, text)),
            prefill_flops_before=prefill_flops(text, length, batch),
            clock=self.watch.seconds,
        )

    def _entrance(self, short: int, text: Any) -> list[int | None]:
        """FLOPs of reading images beforehand, and of layers that fuse them with the text.

        Args:
            short: rows of the shortened prompt.
            text: configuration of the language model.
        """
        encoded, method = self.encoded, self.pipeline.prompt
        read = [n + len(rows) for n, rows in zip(encoded.read, encoded.kept, strict=False)]
        spent = [prefill_flops(text, n, logits=0) for n in read]
        if method is not None and encoded.whole:
            seen = torch.eq(self.call["input_ids"], self.model.config.image_token_id).sum(1)
            for n in (seen + short).tolist():
                spent.append(layered_flops(text, [(n, n)] * method.fuses, logits=0))
        return spent


def _summed(*flops: int | None) -> int | None:
    """The sum, None where one of them is not known."""
    known = [part for part in flops if part is not None]
    return sum(known) if len(known) == len(flops) else None
