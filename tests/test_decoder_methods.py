"""What every method inside the language model promises, on tensors alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.decoder_states import random_state, sample
from tests.methods_list import LAYER_METHODS
from tests.units import QUICK, seeds
from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError, ConfigTypeError, EvidenceError
from vlmcompress.methods import create
from vlmcompress.methods.decoder.base import DecoderState, LayerReducer, Reduction, Site
from vlmcompress.methods.decoder.schedule import average_share

DEPTH = 3
RAGGED = ((3, 12, 7), (0, 9, 4), (5, 20, 1))

every_method = pytest.mark.parametrize(("name", "options"), LAYER_METHODS)
keeps = st.one_of(st.floats(0.01, 1.0), st.integers(1, 30))


def make(name: str, options: dict[str, Any]) -> LayerReducer:
    method = create(name, **options)
    assert isinstance(method, LayerReducer)
    return method


def left_by(state: DecoderState, reduction: Reduction) -> list[int]:
    """Visual rows of each sample that a reduction leaves, merged ones included."""
    kept = (reduction.keep & state.visual).sum(1)
    if reduction.merged_valid is not None:
        kept = kept + reduction.merged_valid.sum(1)
    return kept.tolist()


@every_method
@QUICK
@given(n=st.integers(1, 700), keep=keeps, depth=st.integers(3, 40))
def test_budgets_do_not_grow(
    name: str, options: dict[str, Any], n: int, keep: float | int, depth: int
):
    method = make(name, options)
    counts = method.counts(n, keep, depth)
    assert len(counts) == len(method.sites(depth))
    assert counts[-1] == keeping.count(keep, n)
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] <= n
    assert method.sites(depth) == tuple(sorted(method.sites(depth)))


@every_method
@QUICK
@given(keep=keeps, seed=seeds)
def test_exactly_the_budget_stays(name: str, options: dict[str, Any], keep: float | int, seed: int):
    method = make(name, options)
    state = random_state(RAGGED, seed=seed)
    present = state.visual.sum(1).tolist()
    allowed = [method.counts(n, keep, DEPTH)[0] for n in present]
    reduction = method.reduce(0, state, torch.tensor(allowed))
    assert left_by(state, reduction) == allowed
    assert (reduction.keep | state.visual | ~state.valid).all()


@every_method
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_is_its_samples(name: str, options: dict[str, Any], seed: int):
    method = make(name, options)
    state = random_state(RAGGED, seed=seed)
    k = torch.tensor([5, 3, 11])
    batch = method.reduce(0, state, k)
    for b in range(len(RAGGED)):
        alone = method.reduce(0, sample(state, b), k[b : b + 1])
        columns = state.valid[b]
        assert torch.equal(alone.keep[0], batch.keep[b][columns])
        if batch.hidden is not None:
            assert alone.hidden is not None
            stays = batch.keep[b] & columns
            torch.testing.assert_close(alone.hidden[0][stays[columns]], batch.hidden[b][stays])
        if batch.merged is not None:
            compare_merged(alone, batch, b, int(columns.long().argmax()))


def compare_merged(alone: Reduction, batch: Reduction, b: int, padding: int) -> None:
    assert alone.merged is not None
    assert batch.merged is not None
    assert alone.source is not None
    assert batch.source is not None
    mine, theirs = alone.merged_valid[0], batch.merged_valid[b]
    torch.testing.assert_close(alone.merged[0][mine], batch.merged[b][theirs])
    assert torch.equal(alone.source[0][mine] + padding, batch.source[b][theirs])


@every_method
def test_order_of_heads_does_not_matter(name: str, options: dict[str, Any]):
    method = make(name, options)
    state = random_state(RAGGED, seed=7)
    # Groups of two queries share a key head; both are turned around.
    attention = state.attended()
    mixed = dataclasses.replace(attention, q=attention.q.flip(1), k=attention.k.flip(1))
    k = torch.tensor([5, 3, 11])
    straight = method.reduce(0, state, k)
    turned = method.reduce(0, dataclasses.replace(state, attention=mixed), k)
    assert torch.equal(straight.keep, turned.keep)


@every_method
def test_keeping_all_changes_nothing(name: str, options: dict[str, Any]):
    method = make(name, options)
    state = random_state(RAGGED, seed=2)
    reduction = method.reduce(0, state, state.visual.sum(1))
    assert (reduction.keep | ~state.visual).all()
    assert (reduction.keep & state.visual).sum() == state.visual.sum()
    if reduction.hidden is not None:
        assert torch.equal(reduction.hidden, state.hidden)
    if reduction.merged_valid is not None:
        assert not reduction.merged_valid.any()


def cast(state: DecoderState, dtype: torch.dtype) -> DecoderState:
    a = state.attended()
    return dataclasses.replace(
        state,
        hidden=state.hidden.to(dtype),
        earlier=state.earlier.to(dtype),
        embedded=state.embedded.to(dtype),
        attention=dataclasses.replace(a, q=a.q.to(dtype), k=a.k.to(dtype)),
    )


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decisions_are_made_in_float32(name: str, options: dict[str, Any], dtype: torch.dtype):
    method = make(name, options)
    half = cast(random_state(RAGGED, seed=5), dtype)
    k = torch.tensor([5, 3, 11])
    found, want = method.reduce(0, half, k), method.reduce(0, cast(half, torch.float32), k)
    assert torch.equal(found.keep, want.keep)
    for rows, exact in ((found.hidden, want.hidden), (found.merged, want.merged)):
        assert (rows is None) == (exact is None)
        if rows is not None:
            assert rows.dtype == dtype
            there = want.keep if rows is found.hidden else want.merged_valid
            assert torch.equal(rows[there], exact.to(dtype)[there])


@pytest.mark.parametrize("name", ["sparsevlm", "holitom_llm"])
def test_gradients_reach_what_was_merged(name: str):
    method = make(name, {"layers": (1,), **({"recycled": 1.0} if name == "sparsevlm" else {})})
    state = random_state(RAGGED, seed=5)
    hidden = state.hidden.clone().requires_grad_()
    reduction = method.reduce(0, dataclasses.replace(state, hidden=hidden), torch.tensor([5, 4, 9]))
    if reduction.merged is None:
        total = reduction.hidden[reduction.keep].sum()
    else:
        total = reduction.merged[reduction.merged_valid].sum() + hidden[reduction.keep].sum()
    total.backward()
    assert (hidden.grad.abs().sum(-1) > 0).all()


@every_method
def test_global_random_state_is_left_alone(name: str, options: dict[str, Any]):
    method = make(name, options)
    state = random_state(RAGGED, seed=2)
    before = torch.get_rng_state()
    first = method.reduce(0, state, torch.tensor([4, 4, 4])).keep
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(method.reduce(0, state, torch.tensor([4, 4, 4])).keep, first)


@every_method
def test_options_round_trip(name: str, options: dict[str, Any]):
    method = make(name, options)
    assert create(name, **method.options()) == method


@every_method
def test_what_was_asked_for_and_not_read_is_an_error(name: str, options: dict[str, Any]):
    method = make(name, options)
    state = dataclasses.replace(
        random_state(RAGGED, seed=2), attention=None, earlier=None, embedded=None
    )
    if method.reads == "nothing":
        method.reduce(0, state, torch.tensor([4, 4, 4]))
        return
    with pytest.raises(EvidenceError):
        method.reduce(0, state, torch.tensor([4, 4, 4]))


@every_method
@pytest.mark.parametrize("average", [0.5, 0.7, 0.95])
def test_the_mean_over_layers(name: str, options: dict[str, Any], average: float):
    method = make(name, {**options, "average_keep": average})
    assert method.own_budget
    n = 100_000
    counts = method.counts(n, None, 32)
    found = average_share([count / n for count in counts], method.sites(32), 32)
    assert found == pytest.approx(average, abs=1e-3)
    with pytest.raises(ConfigError, match=r"average_keep is 0"):
        make(name, {**options, "average_keep": 0.0})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1, 3), "Layer 3 does not exist: the stack has 3 layers"),
        ((-4,), "Layer -4 does not exist"),
        ((2, 1), "must be different and ascend"),
        ((1, -2), "must be different and ascend"),
        ((0.3, 0.34), "must be different and ascend"),
        ((0,), "before layer 0"),
    ],
)
@pytest.mark.parametrize(
    "name", [name for name, options in LAYER_METHODS if options.get("layers") is not None]
)
def test_layers_that_do_not_fit(name: str, layers: tuple[float, ...], message: str):
    method = make(name, {"layers": layers})
    with pytest.raises(ConfigError, match=message):
        method.sites(DEPTH)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pyramiddrop", {"ratios": (0.5, 0.6, 0.2)}, "must lie in .0, 1. and not grow"),
        ("pyramiddrop", {"ratios": (0.5,)}, "1 ratios for 3 layers"),
        ("sparsevlm", {"table": (9, 8)}, "2 counts for 3 layers"),
        ("sparsevlm", {"table": (9, 8, 12)}, "must not grow"),
        ("sparsevlm", {"table": 100}, "allowed are 192, 128, 96, 64"),
        ("sparsevlm", {"table": 64, "layers": (1, 2)}, "3 counts for 2 layers"),
        ("sparsevlm", {"table": (9, 8, 0)}, "at least 1"),
        ("sparsevlm", {"table": 64, "average_keep": 0.5}, "table and average_keep"),
        ("sparsevlm", {"rank": (1.0, 2.0), "table": 64}, "table and rank"),
        ("sparsevlm", {"rank": (1.0,)}, r"must be \(scale, bias\)"),
        ("sparsevlm", {"version": 3}, "allowed are 1, 2"),
        ("sparsevlm", {"version": True}, "allowed are 1, 2"),
        ("sparsevlm", {"heads": "auto"}, "give a count or a share"),
        ("sparsevlm", {"recycled": 1.5}, r"lie in \[0, 1\]"),
        ("sparsevlm", {"per_cluster": 0}, "at least 1"),
        ("fitprune", {"schedule": (0.5, 0.6)}, "not grow"),
        ("fitprune", {"schedule": (0.5, 0.0)}, "not grow"),
        ("fitprune", {"schedule": (0.5,), "average_keep": 0.6}, "schedule and average_keep"),
        ("fitprune", {"schedule": "nowhere.json"}, "nowhere.json holds no schedule"),
        ("topv", {"smoothing": 0}, "must be positive"),
        ("topv", {"iterations": 0}, "at least 1"),
        ("topv", {"recovered": 2}, r"lie in \[0, 1\]"),
        ("topv", {"spatial": float("nan")}, "finite"),
        ("fastv", {"average_keep": 1.5}, r"lie in \[0, 1\]"),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        create(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vscan_llm", {"rotary": 1}),
        ("holitom_llm", {"faithful": "yes"}),
        ("prunevid_llm", {"crop": None}),
        ("fitprune", {"schedule": 0.5}),
        ("topv", {"iterations": 1.5}),
        ("sparsevlm", {"layers": 3}),
    ],
)
def test_options_of_the_wrong_type(name: str, options: dict[str, Any]):
    with pytest.raises(ConfigTypeError):
        create(name, **options)


def test_an_average_below_what_the_first_layers_make():
    with pytest.raises(ConfigError, match=r"before its first site alone make 0\.500"):
        make("vscan_llm", {"average_keep": 0.4}).counts(100, None, 32)


def test_a_schedule_of_another_depth():
    method = make("fitprune", {"schedule": (0.8, 0.4)})
    assert method.sites(2) == (Site(0, "between"), Site(1, "between"))
    assert method.counts(10, None, 2) == (8, 4)
    with pytest.raises(ConfigError, match="for 2 layers and this model has 3"):
        method.sites(3)


def test_published_shares_of_depth():
    """Where the defaults act in the models of the papers."""
    where = {"fastv": [2], "sparsevlm": [3, 7, 16], "vscan_llm": [16], "prunevid_llm": [11]}
    for name, layers in where.items():
        assert [site.layer for site in make(name, {}).sites(32)] == layers
    assert make("holitom_llm", {}).sites(28) == (Site(18),)
    assert make("vscan_llm", {}).sites(28) == (Site(14),)


TIED = ("fastv", "vscan_llm", "fitprune", "prunevid_llm", "holitom_llm")


@pytest.mark.parametrize("name", TIED)
def test_ties_go_to_the_earlier_row(name: str):
    state = random_state(((2, 10, 3),), seed=0)
    attention = state.attended()
    flat: Tensor = torch.zeros_like(attention.q)
    state = dataclasses.replace(state, attention=dataclasses.replace(attention, q=flat))
    method = make(name, dict(LAYER_METHODS)[name])
    kept = method.reduce(0, state, torch.tensor([4])).keep[0, 2:12]
    if name == "prunevid_llm":  # two images of 5 tokens with 2 each
        assert kept.tolist() == ([True] * 2 + [False] * 3) * 2
    else:
        assert kept.tolist() == [True] * 4 + [False] * 6
