"""The equalities of methods inside the language model, whose layers work on different rows.

The reference is the unpatched model in which every layer's rows are hidden, or cut, by hand
(`reductions.py`), by what the method was heard to decide. Under kernels whose masks cannot be
written by hand it is a copy of the model that runs sdpa.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.seam import matrix, oracle
from tests.seam.equalities import budgets, cache_size, modes
from tests.seam.reductions import (
    Decision,
    hidden_columns,
    keys_hidden,
    listening,
    rows_cut,
)
from tests.seam.worlds import TWO_IMAGES, World, assert_far, assert_near, float32


def _heard(
    w: World, method: str, keep: Any, positions: str, call: dict[str, Tensor]
) -> tuple[Tensor, list[Decision]]:
    """Logits of the patched model, and what the method decided."""
    told = matrix.configured(method)
    with listening(told) as decisions, w.patched(told, keep, positions):
        return w.model(**call).logits, decisions


def _depth(w: World) -> int:
    return len(w.model.get_decoder().layers)


def _placeholders(w: World, call: dict[str, Tensor]) -> Tensor:
    return call["input_ids"] == w.model.config.image_token_id


@torch.no_grad()
def drop_is_mask(w: World, method: str, keeps: Sequence[Any] | None = None) -> None:
    """Original positions: the full model in whose layers nobody sees what had been dropped."""
    for keep in keeps or budgets(method):
        got, decisions = _heard(w, method, keep, "original", w.call)
        hidden = hidden_columns(_placeholders(w, w.call), decisions, _depth(w))
        with keys_hidden(w.reference, hidden):
            want = w.reference(**w.call).logits
        exact = None
        if w.low:
            with keys_hidden(w.twin, hidden):
                exact = w.twin(**float32(w.call)).logits
        gone = hidden[_depth(w)]
        seen = w.valid & ~gone
        assert_near(got, want, exact, seen, w.tolerance)
        assert gone.any()
        if matrix.configured(method).count_kind == "exact":
            assert gone.any(1).tolist() == [prompt.images > 0 for prompt in oracle.MIXED]
        for b in gone.any(1).nonzero()[:, 0].tolist():
            rounded = None if exact is None else exact[b][seen[b]]
            assert_far(got[b][seen[b]], w.logits[b][seen[b]], want[b][seen[b]], rounded)


@torch.no_grad()
def cut_by_hand(w: World, method: str, keeps: Sequence[Any] | None = None) -> None:
    """Both position modes: the layers of the unpatched model, given what is left by hand."""
    call = w.inputs(TWO_IMAGES)
    for keep in keeps or budgets(method):
        for positions in modes(w, method):
            got, decisions = _heard(w, method, keep, positions, call)
            assert decisions
            want, columns = _cut_logits(w, w.reference, call, decisions, positions)
            exact = None
            if w.low:
                exact, _ = _cut_logits(w, w.twin, float32(call), decisions, positions)
            assert_near(got[:, columns], want, exact, tolerance=w.tolerance)


def _cut_logits(
    w: World, model: Any, call: dict[str, Tensor], decisions: list[Decision], positions: str
) -> tuple[Tensor, Tensor]:
    """Logits of the rows that are left and are the caller's, and their columns."""
    renumbers, length = positions == "contiguous", call["input_ids"].shape[1]
    with rows_cut(model, decisions, renumbers, length) as cutter:
        logits = model(**call, use_cache=False).logits
    gone = hidden_columns(_placeholders(w, call), decisions, _depth(w))[_depth(w)][0]
    there = cutter.columns >= 0
    there[there.clone()] = ~gone[cutter.columns[there]]
    return logits[:, there], cutter.columns[there]


@torch.no_grad()
def cache_bytes(w: World, method: str, keeps: Sequence[Any] | None = None) -> None:
    """Every layer's keys and values are those of the rows that it worked on, and no more."""
    call = w.inputs(oracle.ONE)
    full = w.generate(call, 1).past_key_values
    bytes_per_row, rest = divmod(cache_size(full), _depth(w) * full.get_seq_length())
    assert rest == 0
    told = matrix.configured(method)
    for keep in keeps or budgets(method):
        for positions in modes(w, method):
            with listening(told) as decisions, w.patched(told, keep, positions) as handle:
                short = w.generate(call, 1).past_key_values
                record = handle.last
            lengths = _lengths(decisions, _depth(w), full.get_seq_length())
            assert min(lengths) < full.get_seq_length() or told.count_kind == "content"
            assert [layer.keys.shape[-2] for layer in short.layers] == lengths
            assert cache_size(short) == record.kv_bytes == bytes_per_row * sum(lengths)


def _lengths(decisions: list[Decision], depth: int, length: int) -> list[int]:
    """Rows in the cache of each layer."""
    lengths = [length] * depth
    for decision in decisions:
        reduction = decision.reduction
        left = int(decision.stays.sum())
        if reduction.merged is not None:
            valid = reduction.merged_valid
            left += reduction.merged.shape[1] if valid is None else int(valid.sum())
        first = 0 if reduction.crop_earlier else decision.layer
        lengths[first:] = [left] * (depth - first)
    return lengths
