"""The equalities of logits, ids, caches and traces, for methods of every stage.

What counts as equal is told in `worlds.py`. Where methods inside the language model are compared
with something else, `layer_equalities.py` says with what; what users do with a model beside calling
it stands in `use_equalities.py`; `checks.py` puts all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.seam import matrix, oracle
from tests.seam.worlds import (
    EXACT,
    ROUNDING,
    TWO_IMAGES,
    RandomSource,
    World,
    asking,
    assert_far,
    assert_near,
    assert_same_answer,
    float32,
    rms,
    world,
)
from vlmcompress.families import family_of
from vlmcompress.methods.base import AdaptiveCompressor

__all__ = [
    "EXACT",
    "ROUNDING",
    "TWO_IMAGES",
    "RandomSource",
    "World",
    "asking",
    "assert_near",
    "batch_is_singles",
    "budgets",
    "cache_bytes",
    "cache_size",
    "cached_is_uncached",
    "compare_with_mask",
    "cut_by_hand",
    "drop_is_mask",
    "float32",
    "half",
    "keep_all",
    "modes",
    "remove_restores",
    "rms",
    "traces",
    "world",
]


def budgets(method: str) -> list[Any]:
    """The budgets of the matrix that a method knows; None for one of its own."""
    configured = matrix.configured(method)
    if configured.own_budget:
        return [None]
    known = matrix.BUDGETS[configured.stage]
    if configured.stage != "connector":
        return list(known)
    decides = configured.scored or isinstance(configured, AdaptiveCompressor)
    return [keep for keep in known if decides or keep != "auto"]


def half(method: str) -> float | None:
    """A budget that every method knows: about a half, or None for one of its own."""
    if budgets(method) == [None]:
        return None
    return 4 if matrix.stage_of(method) == "prompt" else 0.5


def modes(w: World, method: str) -> tuple[str, ...]:
    """Position modes that a method knows on a model.

    Inside a language model whose positions have three axes, nothing can be counted anew.
    """
    if matrix.stage_of(method) == "decoder" and family_of(w.model).rope == "mrope":
        return ("original",)
    return matrix.POSITIONS


@torch.no_grad()
def keep_all(w: World, method: str) -> None:
    """keep >= n gives the unpatched model's logits and ids, bit for bit in every dtype."""
    logits, ids = w.logits, w.ids
    for positions in modes(w, method):
        for keep in (1.0, 10_000):
            with w.patched(method, keep, positions) as handle:
                assert torch.equal(w.model(**w.call).logits, logits)
                assert torch.equal(w.generate(w.call).sequences, ids)
                assert handle.last.tokens_after == handle.last.tokens_before


@torch.no_grad()
def drop_is_mask(w: World, method: str, keeps: Sequence[Any] | None = None) -> None:
    """Original positions: the full model in which nobody attends to what was dropped."""
    for keep in keeps or budgets(method):
        with w.patched(method, keep, "original") as handle:
            got = w.model(**w.call).logits
            record = handle.last
        # `auto` may drop so little that rounding hides it.
        fixed = keep != "auto"
        seen = compare_with_mask(w, got, record.kept, record.tokens_before, powerful=fixed)
        dropped = w.valid & ~seen
        assert got.shape == w.logits.shape
        assert (got[dropped] == 0).all()


def compare_with_mask(
    w: World, got: Tensor, kept: Sequence[Tensor], lengths: Sequence[int], powerful: bool = True
) -> Tensor:
    """Compare logits with those of the masked model; the [B, L] columns compared."""
    want = oracle.masked_logits(w.model, w.call, kept, lengths)
    exact = oracle.masked_logits(w.twin, float32(w.call), kept, lengths) if w.low else None
    seen = oracle.drop_mask(w.model, w.call, kept, lengths).bool()
    assert_near(got, want, exact, seen)
    images = [b for b, row in enumerate(w.valid & ~seen) if row.any()]
    for b in images if powerful else ():
        rows = seen[b]
        rounded = None if exact is None else exact[b][rows]
        assert_far(got[b][rows], w.logits[b][rows], want[b][rows], rounded)
    return seen


@torch.no_grad()
def cut_by_hand(w: World, method: str, keeps: Sequence[Any] | None = None) -> None:
    """Contiguous positions: a forward of the prompt cut by hand, with the short features."""
    call = w.inputs(TWO_IMAGES)
    for keep in keeps or budgets(method):
        with w.patched(method, keep, "contiguous", restore_length=False) as handle:
            got = w.model(**call).logits
            record = handle.last
            short = list(handle.encode(**call)["image"].pooler_output)
        if not matrix.exempt("drop_is_mask", method=method, family=w.family):
            _assert_features_are_rows(w, call, short, record.kept)
        want = _cut_logits(w.model, call, record.kept, short)
        wide = [rows.float() for rows in short]
        exact = _cut_logits(w.twin, float32(call), record.kept, wide) if w.low else None
        assert_near(got, want, exact)


def _cut_logits(model: Any, call: dict[str, Any], kept: Any, short: Any) -> Tensor:
    cut = oracle.cut(model, call, kept, short)
    return model(**cut, **oracle.text_positions_like(model, cut)).logits


def _assert_features_are_rows(w: World, call: Any, short: Any, kept: Any) -> None:
    """Selecting before the connector equals selecting after it, up to a matrix product's size."""
    full = oracle.features(w.model, call)
    exact = oracle.features(w.twin, float32(call)) if w.low else [None] * len(full)
    for got, rows, all_rows, wide in zip(short, kept, full, exact, strict=True):
        wide = wide if wide is None else wide[rows][None]
        assert_near(got[None], all_rows[rows][None], wide)


@torch.no_grad()
def batch_is_singles(w: World, method: str, keeps: Sequence[Any] | None = None) -> None:
    """A padded batch answers as its samples alone.

    In half precision the tower rounds a batch otherwise than one image, and a method that looks at
    it may then choose another token. A row is passed over where that happened: its tokens differ,
    and so do the bits that the unpatched tower gives for its images (inside the language model,
    which rounds likewise, only the first is asked for). One row with an image must remain.
    """
    for keep in keeps or budgets(method):
        for positions in modes(w, method):
            with w.patched(method, keep, positions) as handle:
                together = w.generate(w.call)
                _compare_with_singles(w, handle, together, chosen(handle.last))
            length = w.call["input_ids"].shape[1]
            assert torch.equal(together.sequences[:, :length], w.call["input_ids"])


def _compare_with_singles(w: World, handle: Any, together: Any, kept: Sequence[Tensor]) -> None:
    per_image, first, compared = tiny.tokens_per_image(w.model), 0, 0
    for b, prompt in enumerate(oracle.MIXED):
        single = oracle.row(w.call, b, w.model.config.image_token_id, per_image)
        alone = w.generate(single)
        images = slice(first, first + prompt.images)
        first += prompt.images
        if prompt.images and not _equal(chosen(handle.last), kept[images]):
            assert w.low, f"row {b} keeps other tokens alone"
            if handle.last.layer_tokens:
                continue
            with handle.disabled():
                same = _equal(
                    oracle.features(w.model, single), oracle.features(w.model, w.call)[images]
                )
            assert not same, f"row {b} keeps other tokens alone, of the same features"
            continue
        assert_same_answer(w, alone, together, 0, b)
        compared += bool(prompt.images)
    assert compared, "no row was compared"


def chosen(record: Any) -> tuple[Tensor, ...]:
    """Per image, what a call kept: rows of the image, of every layer where layers differ."""
    layers = [record.kept_in(layer) for layer in range(len(record.layer_tokens))]
    return tuple(map(torch.cat, zip(*layers, strict=True))) if layers else record.kept


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@torch.no_grad()
def cached_is_uncached(w: World, method: str, keeps: Sequence[Any] | None = None) -> None:
    """Generation over the short cache answers as generation that computes everything anew."""
    for keep in keeps or budgets(method):
        for positions in modes(w, method):
            with w.patched(method, keep, positions):
                cached = w.generate(w.call)
                uncached = w.generate(w.call, use_cache=False)
            for b in range(len(oracle.MIXED)):
                assert_same_answer(w, cached, uncached, b, b)


def cache_size(cache: Any) -> int:
    """Bytes of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def cache_bytes(w: World, method: str, keeps: Sequence[Any] | None = None) -> None:
    """The key-value cache is shorter by exactly the dropped tokens, in every layer."""
    call = w.inputs(oracle.ONE)
    full = w.generate(call, 1).past_key_values
    for keep in keeps or budgets(method):
        for positions in modes(w, method):
            with w.patched(method, keep, positions) as handle:
                short = w.generate(call, 1).past_key_values
                record = handle.last
            dropped = record.tokens_before[0] - record.tokens_after[0]
            assert dropped == record.prompt_length - record.short_length > 0
            assert full.get_seq_length() - short.get_seq_length() == dropped
            bytes_per_column, rest = divmod(cache_size(full), full.get_seq_length())
            assert rest == 0
            assert cache_size(short) == bytes_per_column * short.get_seq_length()
            assert record.kv_bytes == cache_size(short)


def traces(model: Any) -> list[tuple[str, Any]]:
    """Attributes, replaced methods and hooks that a patch left on a model."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        found += [
            (name, key)
            for key in module.__dict__
            if "vlmcompress" in key or key in ("forward", "generate")
        ]
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        found += [(name, h) for group in hooks for h in group.values() if "vlmcompress" in repr(h)]
    return found


@torch.no_grad()
def remove_restores(w: World, method: str) -> None:
    """After `remove()`, logits and ids bit for bit, no attribute and no hook of ours."""
    logits, ids, keys = w.logits, w.ids, list(w.model.state_dict())
    handle = w.patched(method, half(method), "auto")
    assert traces(w.model)
    assert list(w.model.state_dict()) == keys
    w.model(**w.call)
    w.generate(w.call)
    handle.remove()
    handle.remove()
    assert traces(w.model) == []
    assert torch.equal(w.model(**w.call).logits, logits)
    assert torch.equal(w.generate(w.call).sequences, ids)
