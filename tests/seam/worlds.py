"""Unpatched models, what they compute, and when two computations count as equal.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.seam import kernels, matrix, oracle
from tests.tiny import Prompt
from tests.tiny.configs import BOS, FIRST_TEXT_ID
from vlmcompress import patch
from vlmcompress.families import family_of
from vlmcompress.methods import Method

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
            self.twin = plain_kernel(self.model).float()

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
    def reference(self) -> Any:
        """The model under a kernel whose masks can be written by hand: itself where it has one."""
        return self.model if self.kernel in ("sdpa", "eager") else plain_kernel(self.model)

    @cached_property
    def tolerance(self) -> float:
        """How far logits in float32 may lie from the reference's: two kernels round differently."""
        if self.reference is self.model:
            return EXACT
        return EXACT + 2 * (self.logits - self.reference(**self.call).logits).abs().max().item()

    @cached_property
    def rounding(self) -> float:
        """Root mean square by which the unpatched model differs from its float32 copy."""
        return rms((self.logits - self.twin(**float32(self.call)).logits)[self.valid])

    def generate(self, call: Mapping[str, Any], tokens: int = NEW_TOKENS, **more: Any) -> Any:
        """A greedy generate with everything that it returns."""
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        return self.model.generate(**call, **oracle.greedy(self.model, tokens), **wanted, **more)

    def patched(self, method: str | Method, keep: Any, positions: str, **more: Any) -> Any:
        """The model under a method, or one of the shared list, as a context."""
        return patched(self.model, method, keep, positions, **more)


def patched(model: Any, method: str | Method, keep: Any, positions: str, **more: Any) -> Any:
    """A model under a method, or one of the shared list, as a context."""
    configured = matrix.configured(method) if isinstance(method, str) else method
    if configured.needs().asks:
        more = {**asking(model), **more}
    return patch(model, configured, keep=keep, positions=positions, **more)


def plain_kernel(model: Any) -> Any:
    """A copy of a model that runs sdpa."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("sdpa")
    return twin


def asking(model: Any) -> dict[str, Any]:
    """A question, and what compares it with a model's patches."""
    tower = family_of(model).tower_module(model.base_model)
    return {
        "clip": RandomSource(tower.config.hidden_size),
        "processor": Letters(),
        "question": "which one?",
    }


class Letters:
    """A tokenizer with one id per letter, text ids all of them."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Ids of a text."""
        return {"input_ids": [BOS, *(FIRST_TEXT_ID + ord(c) % 90 for c in text)]}


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


def assert_near(
    got: Tensor,
    want: Tensor,
    exact: Tensor | None,
    where: Tensor | None = None,
    tolerance: float = EXACT,
) -> None:
    """Two computations of one thing agree, row by row.

    Args:
        got: [B, L, ...] of the patched model.
        want: the same of the unpatched one.
        exact: the same of its float32 copy; None in float32.
        where: [B, L] bool, what is compared; everything if not given.
        tolerance: in float32.
    """
    assert got.shape == want.shape
    where = torch.ones(got.shape[:2], dtype=torch.bool) if where is None else where
    for b, rows in enumerate(where):
        difference = got[b][rows].float() - want[b][rows].float()
        if exact is None:
            assert difference.abs().max() < tolerance, f"row {b}"
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
