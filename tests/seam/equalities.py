"""The equalities that every method is held to, on any family, kernel and dtype.

In float32 two computations of the same logits differ by less than `EXACT`, and generated ids are
equal. In half precision they differ by their rounding, which is measured, not guessed: the same
computation is repeated on a float32 copy of the model (same weights), and the root mean square of
the difference is the rounding of the unpatched model. Two computations that are both right each
carry it, so they may lie 1.4 times that apart; `ROUNDING` is the limit, for each row of a batch.
A token too many, or a position off by one, moves the logits by eight times it and more, which every
comparison with a fixed budget asserts of what was dropped, and `tests/seam/test_exactness.py` of
mistakes made on purpose.

Ids are not compared in half precision, where two candidates may lie within rounding of each other:
the logits of each step are, up to and including the first at which the ids part. Where nothing is
computed anew (keep all, remove, cache bytes) equality is bit for bit in every dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.seam import kernels, matrix, oracle
from tests.tiny import Prompt
from vlmcompress import patch
from vlmcompress.families import family_of
from vlmcompress.methods.base import AdaptiveCompressor

EXACT = 1e-5
ROUNDING = 2.0
#: Where the rounding was measured on another, longer prompt than the one compared.
ROUNDING_ELSEWHERE = 3.0
NEW_TOKENS = 3
TWO_IMAGES = (Prompt(images=2, text=7),)


class World:
    """An unpatched model, a batch for it, and what it computes.

    Attributes:
        family: of `tests.tiny`.
        kernel: attention implementation of tower and language model.
        dtype: of weights and pixels.
        model: the model.
        low: whether the dtype is a half precision.
        twin: in half precision, a float32 copy of the model.
    """

    def __init__(self, family: str, kernel: str = "sdpa", dtype: str = "float32") -> None:
        self.family, self.kernel, self.dtype = family, kernel, getattr(torch, dtype)
        self.model = kernels.build(family, kernel, self.dtype)
        self.low = self.dtype != torch.float32
        self.twin: Any = None
        if self.low:
            self.twin = copy.deepcopy(self.model).float()
            self.twin.set_attn_implementation("sdpa")

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """A batch in the model's dtype, on its device."""
        call = tiny.inputs(self.model, prompts)
        call = {name: value.to(self.model.device) for name, value in call.items()}
        return {n: v.to(self.dtype) if v.is_floating_point() else v for n, v in call.items()}

    @cached_property
    def call(self) -> dict[str, Tensor]:
        """Two images, one and none, padded."""
        return self.inputs(oracle.MIXED)

    @cached_property
    def valid(self) -> Tensor:
        """[B, L] columns of the batch that are no padding."""
        return self.call["attention_mask"].bool()

    @cached_property
    def logits(self) -> Tensor:
        """What the unpatched model says of the batch."""
        return self.model(**self.call).logits

    @cached_property
    def ids(self) -> Tensor:
        """What the unpatched model generates."""
        return self.generate(self.call).sequences

    @cached_property
    def rounding(self) -> float:
        """Root mean square by which the unpatched model differs from its float32 copy."""
        return rms((self.logits - self.twin(**float32(self.call)).logits)[self.valid])

    def generate(self, call: Mapping[str, Any], tokens: int = NEW_TOKENS, **more: Any) -> Any:
        """A greedy generate with everything that it returns."""
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        return self.model.generate(**call, **oracle.greedy(self.model, tokens), **wanted, **more)

    def patched(self, method: str, keep: float | int | str, positions: str, **more: Any) -> Any:
        """The model under a method of the shared list, as a context."""
        configured = matrix.configured(method)
        if configured.needs().text:
            more = {**asking(self.model), **more}
        return patch(self.model, configured, keep=keep, positions=positions, **more)


def asking(model: Any) -> dict[str, Any]:
    """A question, and what compares it with a model's patches."""
    tower = family_of(model).tower_module(model.base_model)
    return {"clip": RandomSource(tower.config.hidden_size), "question": "which one?"}


@dataclass(frozen=True)
class RandomSource:
    """Embeds every text alike and patches by a fixed projection.

    Attributes:
        width: of the tower's states.
    """

    width: int

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(5))

    def texts(self, texts: Sequence[str]) -> list[Tensor]:
        """[2, 6] per text."""
        return [self._draw(2, 6) for _ in texts]

    def patches(self, states: Tensor) -> Tensor:
        """[..., 6] of the tower's states."""
        return states.float() @ self._draw(self.width, 6).to(states.device)


@lru_cache(maxsize=4)
@torch.no_grad()
def world(family: str, kernel: str = "sdpa", dtype: str = "float32") -> World:
    """A world, kept while the tests stay near it."""
    made = World(family, kernel, dtype)
    _ = made.ids  # what the model computes unpatched must not be asked for first under a patch
    _ = made.rounding if made.low else made.logits
    return made


def float32(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call for the float32 copy."""
    return {n: v.float() if v.is_floating_point() else v for n, v in call.items()}


def rms(x: Tensor) -> float:
    """Root mean square of all elements."""
    return x.float().square().mean().sqrt().item()


def budgets(method: str) -> list[float | int | str]:
    """The budgets of the matrix that a method knows; `auto` needs scores."""
    configured = matrix.configured(method)
    decides = configured.scored or isinstance(configured, AdaptiveCompressor)
    return [keep for keep in matrix.BUDGETS if decides or keep != "auto"]


def assert_near(
    got: Tensor, want: Tensor, exact: Tensor | None, where: Tensor | None = None
) -> None:
    """Two computations of one thing agree, row by row.

    Args:
        got: [B, L, ...] of the patched model.
        want: the same of the unpatched one.
        exact: the same of its float32 copy; None in float32.
        where: [B, L] bool, what is compared; everything if not given.
    """
    assert got.shape == want.shape
    where = torch.ones(got.shape[:2], dtype=torch.bool) if where is None else where
    for b, rows in enumerate(where):
        difference = got[b][rows].float() - want[b][rows].float()
        if exact is None:
            assert difference.abs().max() < EXACT, f"row {b}"
        else:
            limit = ROUNDING * rms(want[b][rows].float() - exact[b][rows])
            assert rms(difference) <= limit, f"row {b}: {rms(difference):.3g} > {limit:.3g}"


def assert_far(got: Tensor, full: Tensor, want: Tensor, exact: Tensor | None) -> None:
    """What was dropped moved the logits by far more than the comparison forgives."""
    moved = rms(got.float() - full.float())
    forgiven = EXACT if exact is None else ROUNDING * rms(want.float() - exact)
    assert moved > 2 * forgiven, "the comparison has no power"


def assert_same_answer(w: World, got: Any, want: Any, b: int = 0, other: int = 0) -> None:
    """Row `b` of one generation answers as row `other` of another."""
    new = len(got.logits)
    ids, others = got.sequences[b, -new:], want.sequences[other, -new:]
    if not w.low:
        assert torch.equal(ids, others)
        return
    parted = (ids != others).nonzero()
    steps = int(parted[0]) + 1 if len(parted) else new
    apart = torch.stack(
        [got.logits[t][b].float() - want.logits[t][other].float() for t in range(steps)]
    )
    limit = ROUNDING_ELSEWHERE * w.rounding
    assert rms(apart) <= limit, f"{rms(apart):.3g} > {limit:.3g} after {steps} steps"


@torch.no_grad()
def keep_all(w: World, method: str) -> None:
    """keep >= n gives the unpatched model's logits and ids, bit for bit in every dtype."""
    logits, ids = w.logits, w.ids
    for positions in matrix.POSITIONS:
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
    and so do the bits that the unpatched tower gives for its images. One row with an image must
    remain.
    """
    for keep in keeps or budgets(method):
        for positions in matrix.POSITIONS:
            with w.patched(method, keep, positions) as handle:
                together = w.generate(w.call)
                kept = handle.last.kept
                _compare_with_singles(w, handle, together, kept)
            length = w.call["input_ids"].shape[1]
            assert torch.equal(together.sequences[:, :length], w.call["input_ids"])


def _compare_with_singles(w: World, handle: Any, together: Any, kept: Sequence[Tensor]) -> None:
    per_image, first, compared = tiny.tokens_per_image(w.model), 0, 0
    for b, prompt in enumerate(oracle.MIXED):
        single = oracle.row(w.call, b, w.model.config.image_token_id, per_image)
        alone = w.generate(single)
        images = slice(first, first + prompt.images)
        first += prompt.images
        if prompt.images and not _equal(handle.last.kept, kept[images]):
            assert w.low, f"row {b} keeps other tokens alone"
            with handle.disabled():
                same = _equal(
                    oracle.features(w.model, single), oracle.features(w.model, w.call)[images]
                )
            assert not same, f"row {b} keeps other tokens alone, of the same features"
            continue
        assert_same_answer(w, alone, together, 0, b)
        compared += bool(prompt.images)
    assert compared, "no row was compared"


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@torch.no_grad()
def cached_is_uncached(w: World, method: str, keeps: Sequence[Any] | None = None) -> None:
    """Generation over the short cache answers as generation that computes everything anew."""
    for keep in keeps or budgets(method):
        for positions in matrix.POSITIONS:
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
        for positions in matrix.POSITIONS:
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
    handle = w.patched(method, 0.5, "auto")
    assert traces(w.model)
    assert list(w.model.state_dict()) == keys
    w.model(**w.call)
    w.generate(w.call)
    handle.remove()
    handle.remove()
    assert traces(w.model) == []
    assert torch.equal(w.model(**w.call).logits, logits)
    assert torch.equal(w.generate(w.call).sequences, ids)


CHECKS: dict[str, Callable[[World, str], None]] = {
    "keep_all": keep_all,
    "drop_is_mask": drop_is_mask,
    "cut_by_hand": cut_by_hand,
    "batch_is_singles": batch_is_singles,
    "cached_is_uncached": cached_is_uncached,
    "cache_bytes": cache_bytes,
    "remove_restores": remove_restores,
}
