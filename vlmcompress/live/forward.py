"""The hooks on the outer model: shorten before its forward, restore the logits' length after it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.costs import cache_bytes
from vlmcompress.core.errors import UnsupportedModelError
from vlmcompress.core.placement import Placement
from vlmcompress.live import calls, conversation, decoder, prompting
from vlmcompress.live.inputs import by_name
from vlmcompress.live.state import State, state_of


@dataclass(frozen=True)
class Restore:
    """How a running forward is finished.

    Attributes:
        call: the shortened call.
        columns: caller's columns whose logits were asked for; None for all.
        start: when the language model began.
        rows: [S] short columns whose logits the model computes; None for all.
    """

    call: calls.ShortCall
    columns: Tensor | None
    rows: Tensor | None
    start: Any


def before_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the outer model; `question` is for methods, not for the model."""
    state = state_of(module)
    if state is None:
        return None
    changed = _before_forward(module, state, args, kwargs)
    if "question" not in kwargs:
        return changed
    args, kwargs = changed or (args, kwargs)
    return args, {name: value for name, value in kwargs.items() if name != "question"}


def _before_forward(
    module: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if getattr(module, "_is_replica", False):
        raise UnsupportedModelError(
            "DataParallel copies a model without its methods, so that a patch cannot follow; use "
            "DistributedDataParallel, one process per device."
        )
    local = state.local
    local.pending = None
    prompting.leave()
    if local.generating:
        changed = _inside_generate(module, args, kwargs)
        given, named = (args, kwargs) if changed is None else changed
        _enter_generated(module, state, by_name(type(module).forward, given, named))
        return changed
    call = by_name(type(module).forward, args, kwargs)
    record = conversation.record_of(call.get("past_key_values"))
    if (state.active or record is not None) and calls.carries_images(call):
        return (), _shorten(module, state, call)
    if record is not None:
        # Also while disabled: the cache is short whatever happens now.
        # It need not learn of new text, which goes into it column by column.
        arguments, _, _ = conversation.forward_turn(module, state.family, call, record, None)
        decoder.enter(module, state, arguments)
        return (), arguments
    decoder.enter(module, state, call)
    if state.active and call.get("past_key_values") is None:
        state.calls["without"] += 1
    return None


def _inside_generate(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """`generate` drops all-ones masks; without one, gapped positions read as packed sequences."""
    call = by_name(type(module).forward, args, kwargs)
    if call.get("attention_mask") is None and call.get("position_ids") is not None:
        cache, ids = call.get("past_key_values"), call.get("input_ids")
        if ids is not None and (cache is None or cache.get_seq_length() == 0):
            return (), {**call, "attention_mask": torch.ones_like(ids)}
    return None


def _enter_generated(module: nn.Module, state: State, call: dict[str, Any]) -> None:
    """A forward inside `generate`: its prefill, which brings the images, or a step over a cache."""
    short = state.local.generated
    if short is None:
        decoder.enter(module, state, call)
        return
    call = {**call, "attention_mask": decoder.flat_mask(call, short.arguments["attention_mask"])}
    if call.get("mm_encoder_outputs") is None:
        decoder.enter(module, state, call)
    else:
        prompt = (
            None if call.get("past_key_values") is None else short.arguments["input_ids"].shape[1]
        )
        decoder.enter(module, state, call, short.record, short.layers, prompt)
        prompting.enter(module, state, call, short)


def _shorten(module: nn.Module, state: State, call: dict[str, Any]) -> dict[str, Any]:
    short = calls.prepare(module, state, call, generating=False)
    arguments = short.arguments
    columns = rows = None
    asked = call.get("logits_to_keep", 0)
    if short.placement is not None and not (isinstance(asked, int) and asked == 0):
        columns, rows = _asked_rows(asked, short.placement)
        arguments["logits_to_keep"] = rows
    state.calls["with"] += 1
    state.local.last = short.record
    state.local.pending = Restore(short, columns, rows, short.watch.mark())
    decoder.enter(module, state, arguments, short.record, short.layers)
    prompting.enter(module, state, arguments, short)
    return arguments


def _asked_rows(asked: int | Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """The caller's columns asked for, and the short columns that together cover them."""
    every = torch.arange(placement.length, device=placement.index.device)
    columns = every[-asked:] if isinstance(asked, int) else every[asked.to(every.device)]
    short = placement.short_column()[:, columns]
    rows = short[short >= 0].unique()
    return columns, rows if len(rows) else rows.new_zeros(1)


def after_forward(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the outer model."""
    state = state_of(module)
    if state is None:
        return None
    pending, state.local.pending = state.local.pending, None
    if state.local.generating:
        _after_prefill(state, output)
        return None
    if pending is None:
        return None
    cache = _cache_of(output)
    finish(state, pending.call, cache, pending.start)
    conversation.mark(cache, pending.call.cache)
    placement = pending.call.placement
    if placement is None or not state.restore_length:
        return None
    return _with_logits(output, kwargs, lambda logits: _restore(logits, placement, pending))


def _after_prefill(state: State, output: Any) -> None:
    prefill, state.local.prefill = state.local.prefill, None
    if prefill is not None:
        call, start = prefill
        finish(state, call, _cache_of(output), start)


def finish(state: State, call: calls.ShortCall, cache: Any, start: Any) -> None:
    """Complete the record of a call once the language model has seen its prompt."""
    call.watch.add("prefill", start, call.watch.mark())
    record = decoder.leave(state, call.record)
    state.local.last = dataclasses.replace(record, kv_bytes=cache_bytes(cache))


def _cache_of(output: Any) -> Any:
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def _with_logits(output: Any, kwargs: dict[str, Any], change: Any) -> Any:
    if isinstance(output, tuple):
        where = 1 if kwargs.get("labels") is not None else 0
        return (*output[:where], change(output[where]), *output[where + 1 :])
    output.logits = change(output.logits)
    return output


def _restore(logits: Tensor, placement: Placement, pending: Restore) -> Tensor:
    """Logits at the caller's columns ([B, L or asked, V]), zeros where a token was dropped."""
    if pending.rows is None or pending.columns is None:
        # Padding goes to a spare column that is cut off.
        out = logits.new_zeros(logits.shape[0], placement.length + 1, logits.shape[-1])
        target = torch.where(placement.valid, placement.index, placement.length)
        return out.scatter(1, target[..., None].expand_as(logits), logits)[:, :-1]
    short = placement.short_column()[:, pending.columns]
    place = torch.searchsorted(pending.rows, short.clamp(min=0)).clamp(max=logits.shape[1] - 1)
    rows = logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))
    return rows.masked_fill((short < 0)[..., None], 0)
