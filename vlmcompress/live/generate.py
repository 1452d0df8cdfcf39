"""The instance-level `generate`: shorten once, let the model work, put the caller's ids back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.live import calls, conversation, inputs
from vlmcompress.live.inputs import by_name
from vlmcompress.live.state import State, state_of


@functools.wraps(GenerationMixin.generate)
def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` with images compressed; the same arguments and return value."""
    state = state_of(self)
    native: Callable[..., Any] = type(self).generate.__get__(self)
    if state is not None and state.generate is not None:
        native = state.generate
    if state is None or state.local.generating:
        return native(*args, **kwargs)
    question = kwargs.pop("question", None)
    call = by_name(GenerationMixin.generate, args, kwargs)
    record = conversation.record_of(call.get("past_key_values"))
    if not state.active and record is None:
        return native(*args, **kwargs)
    if call.get("inputs") is not None:
        call["input_ids"] = call.pop("inputs")
    if calls.carries_images(call):
        return _with_images(self, state, native, {**call, "question": question})
    if record is not None:
        return _with_cache(self, state, native, call, record)
    state.calls["without"] += 1
    return native(*args, **kwargs)


def _with_images(model: Any, state: State, native: Callable[..., Any], call: dict[str, Any]) -> Any:
    inputs.require_ids(call)
    with torch.no_grad():
        call = _with_mask(model, call)
        short = calls.prepare(model, state, call, generating=True)
    state.calls["with"] += 1
    state.local.last = short.record
    arguments = short.arguments
    if short.placement is not None:
        _refuse_ragged_beams(model, call, short)
        arguments = _show_full_ids(call["input_ids"], short.placement.short_length, arguments)
        arguments = _adjust_lengths(model, arguments, short.placement.shortened_by)
    state.local.prefill = (short, short.watch.mark())
    state.local.generated = short
    result = _run(state, native, arguments)
    conversation.mark(call.get("past_key_values"), short.cache)
    conversation.mark(getattr(result, "past_key_values", None), short.cache)
    if short.placement is None:
        return result
    return _put_back(result, call["input_ids"], short.placement.short_length)


def _with_cache(
    model: Any,
    state: State,
    native: Callable[..., Any],
    call: dict[str, Any],
    record: conversation.CacheRecord,
) -> Any:
    """A later turn without images over a shortened cache."""
    inputs.require_ids(call)
    call = _with_mask(model, call)
    arguments, turn, grown = conversation.generate_turn(model, state.family, call, record, None)
    arguments = _show_full_ids(call["input_ids"], turn.whole.short_length, arguments)
    arguments = _adjust_lengths(model, arguments, turn.whole.shortened_by)
    result = _run(state, native, arguments)
    conversation.mark(call["past_key_values"], grown)
    conversation.mark(getattr(result, "past_key_values", None), grown)
    return _put_back(result, call["input_ids"], turn.whole.short_length)


def _run(state: State, native: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    state.local.generating += 1
    try:
        return native(**arguments)
    finally:
        state.local.generating -= 1
        state.local.prefill = state.local.generated = None


def _with_mask(model: Any, call: dict[str, Any]) -> dict[str, Any]:
    """`generate` infers a missing mask from padding ids; so must we, before ids are shortened."""
    if call.get("attention_mask") is not None:
        return call
    ids = call["input_ids"]
    config = call.get("generation_config") or model.generation_config
    pad, eos = config.pad_token_id, config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    has_padding = pad is not None and pad not in ends and bool((ids == pad).any())
    mask = ids != pad if has_padding else torch.ones_like(ids, dtype=torch.bool)
    return {**call, "attention_mask": mask.long()}


def _refuse_ragged_beams(model: Any, call: dict[str, Any], short: calls.ShortCall) -> None:
    features = short.arguments["mm_encoder_outputs"]["image"].pooler_output
    ragged = isinstance(features, Tensor) and len(set(short.record.tokens_after)) > 1
    config = call.get("generation_config") or model.generation_config
    copies = [
        call.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences")
    ]
    if ragged and max(copies) > 1:
        raise UnsupportedInputError(
            f"Images keep different counts ({sorted(set(short.record.tokens_after))}) and "
            f"{type(model).__name__} cannot expand those for beams or several return sequences; "
            "use one beam, or a keep that gives every image the same count."
        )


def _adjust_lengths(model: Any, arguments: dict[str, Any], shortened_by: int) -> dict[str, Any]:
    """`max_length` and `min_length` count the prompt, which is shorter now."""
    out = dict(arguments)
    config = out.get("generation_config")
    if config is not None:
        config = out["generation_config"] = copy.deepcopy(config)
    for name in ("max_length", "min_length"):
        if out.get(name) is not None:
            out[name] = max(out[name] - shortened_by, 0)
        elif config is not None and getattr(config, name) is not None:
            setattr(config, name, max(getattr(config, name) - shortened_by, 0))
        elif getattr(model.generation_config, name, None) is not None:
            out[name] = max(getattr(model.generation_config, name) - shortened_by, 0)
    return out


def _put_back(result: Any, full_ids: Tensor, short_length: int) -> Any:
    if isinstance(result, Tensor):
        return _full_ids(result, full_ids, short_length)
    result.sequences = _full_ids(result.sequences, full_ids, short_length)
    return result


def _full_ids(ids: Tensor, full_ids: Tensor, short_length: int) -> Tensor:
    """The caller's prompt ids followed by what was generated; rows repeat for beams and samples."""
    copies = ids.shape[0] // full_ids.shape[0]
    prompt = full_ids.to(ids.device).repeat_interleave(copies, dim=0)
    return torch.cat([prompt, ids[:, short_length:]], dim=1)


def _show_full_ids(
    full_ids: Tensor, short_length: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Users' criteria, processors, prefix functions and streamers see the caller's ids."""

    def expand(ids: Tensor) -> Tensor:
        return _full_ids(ids, full_ids, short_length)

    out = dict(arguments)
    if out.get("logits_processor"):
        out["logits_processor"] = LogitsProcessorList(
            _FullIdsProcessor(p, expand) for p in out["logits_processor"]
        )
    if out.get("stopping_criteria"):
        out["stopping_criteria"] = StoppingCriteriaList(
            _FullIdsCriteria(c, expand) for c in out["stopping_criteria"]
        )
    if out.get("prefix_allowed_tokens_fn") is not None:
        allowed = out["prefix_allowed_tokens_fn"]
        out["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat([full_ids[row].to(ids.device), ids[short_length:]])
        )
    if out.get("streamer") is not None:
        out["streamer"] = _FullIdsStreamer(out["streamer"], full_ids)
    return out


class _FullIdsProcessor(LogitsProcessor):
    """Calls a user's processor with the caller's ids."""

    def __init__(self, processor: Any, expand: Callable[[Tensor], Tensor]) -> None:
        self._processor, self._expand = processor, expand

    # transformers reads this signature and takes further parameters for required ones.
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._processor(self._expand(input_ids), scores)  # type: ignore[no-any-return]


class _FullIdsCriteria(StoppingCriteria):
    """Calls a user's stopping criterion with the caller's ids."""

    def __init__(self, criterion: Any, expand: Callable[[Tensor], Tensor]) -> None:
        self._criterion, self._expand = criterion, expand

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self._criterion(self._expand(input_ids), scores, **kwargs)


class _FullIdsStreamer(BaseStreamer):
    """Hands a user's streamer the caller's prompt first, then what is generated."""

    def __init__(self, streamer: Any, full_ids: Tensor) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = full_ids

    def put(self, value: Tensor) -> None:
        """The first value is the prompt."""
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None
        self._streamer.put(value)

    def end(self) -> None:
        """End of the stream."""
        self._streamer.end()
