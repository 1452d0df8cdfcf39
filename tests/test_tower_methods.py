"""What every method inside the tower promises, on tensors alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods_list import TOWER_METHODS
from tests.units import QUICK, seeds
from vlmcompress.core.errors import ConfigError, ConfigTypeError, EvidenceError
from vlmcompress.methods import TowerReducer, create
from vlmcompress.methods.ops import merging, schedules
from vlmcompress.methods.tower.base import TowerAttention, TowerState
from vlmcompress.methods.tower.shape import TowerShape
from vlmcompress.methods.tower.zero_tprune import ZeroTPrune, page_rank

DEPTH, HEADS, WIDTH = 12, 3, 8

every_method = pytest.mark.parametrize(("name", "options"), TOWER_METHODS)


def make(name: str, options: dict[str, Any]) -> TowerReducer:
    method = create(name, **options)
    assert isinstance(method, TowerReducer)
    return method


def state_for(n: int, b: int = 2, cls: int = 1, seed: int = 0) -> TowerState:
    """Random rows with a block's attention."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n + cls, WIDTH, generator=generator)
    q, k, v = torch.randn(3, b, HEADS, n + cls, 4, generator=generator)
    state = TowerState.whole(x, cls, DEPTH)
    return dataclasses.replace(state, attention=TowerAttention(q, k, 0.5, v))


def reduce(method: TowerReducer, layer: int, state: TowerState, k: int) -> TowerState:
    """With what the method learns, untrained."""
    n = state.patches
    plan = (n,) * layer + (k,) * (DEPTH - layer)
    shape = TowerShape(WIDTH, 4, n, state.cls_rows, DEPTH, plan)
    return method.reduce(layer, dataclasses.replace(state, parts=method.parts(shape)), k)


def unit(state: TowerState, i: int) -> TowerState:
    """One image of a batch."""
    rows = slice(i, i + 1)
    a = state.attended()
    attention = TowerAttention(a.q[rows], a.k[rows], a.scale, None if a.v is None else a.v[rows])
    x, mass, source = state.hidden[rows], state.mass[rows], state.source[rows]
    return TowerState(x, mass, source, state.assignment[rows], state.cls_rows, DEPTH, attention)


@every_method
@QUICK
@given(side=st.integers(4, 12), share=st.floats(0.3, 0.99), seed=seeds)
def test_counts_places_and_masses(
    name: str, options: dict[str, Any], side: int, share: float, seed: int
):
    method, n = make(name, options), side * side
    k = max(method.tokens_kept(n, share), -(-n // 2))
    if name in ("sta", "token_clustering", "t2t"):
        k = method.tokens_kept(n, share)
    if k == n:
        return
    short = reduce(method, 4, state_for(n, seed=seed), k)
    assert short.patches == k
    assert short.hidden.shape == (2, k + 1, WIDTH)
    assert torch.equal(short.source[:, 0], torch.tensor([-1, -1]))
    for source, assignment, mass in zip(short.source, short.assignment, short.mass, strict=True):
        assert len(set(source.tolist())) == k + 1
        assert torch.equal(assignment[source[1:]], torch.arange(1, k + 1))
        counts = torch.bincount(assignment[assignment >= 0], minlength=k + 1)
        assert torch.equal(counts[1:].float(), mass[1:])
        assert mass[0] == 1


@every_method
def test_batch_is_its_units_alone(name: str, options: dict[str, Any]):
    method, state = make(name, options), state_for(36, b=3)
    k = method.tokens_kept(36, 0.6)
    batch = reduce(method, 3, state, k)
    for i in range(3):
        alone = reduce(method, 3, unit(state, i), k)
        assert torch.equal(alone.source[0], batch.source[i])
        assert torch.equal(alone.assignment[0], batch.assignment[i])
        torch.testing.assert_close(alone.hidden[0], batch.hidden[i], rtol=0, atol=1e-5)


@every_method
@QUICK
@given(
    side=st.integers(3, 27),
    keep=st.one_of(st.floats(0.02, 1), st.integers(10, 700)),
    depth=st.integers(8, 30),
)
def test_schedules_end_where_they_are_asked_to(
    name: str, options: dict[str, Any], side: int, keep: float | int, depth: int
):
    method, n = make(name, options), side * side
    last = depth - 2
    plan = method.schedule(n, keep, depth, last)
    assert len(plan) == last + 1
    assert plan[-1] == method.tokens_kept(n, keep) <= n
    assert all(a >= b for a, b in zip((n, *plan), plan, strict=False))
    if method.weighs_keys:
        assert all(b >= a - a // 2 for a, b in zip((n, *plan), plan, strict=False))


@every_method
def test_options_round_trip(name: str, options: dict[str, Any]):
    method = make(name, options)
    assert create(name, **method.options()) == method
    assert method.stage == "tower"
    assert method.looks_at


@every_method
def test_global_random_state_is_left_alone(name: str, options: dict[str, Any]):
    method, before = make(name, options), torch.get_rng_state()
    first = reduce(method, 3, state_for(36), method.tokens_kept(36, 0.6))
    again = reduce(method, 3, state_for(36), method.tokens_kept(36, 0.6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.hidden, again.hidden)


@every_method
def test_what_was_not_read_is_an_error(name: str, options: dict[str, Any]):
    method = make(name, options)
    if not method.reads:
        return
    with pytest.raises(EvidenceError, match="needs a block's attention"):
        method.reduce(3, dataclasses.replace(state_for(36), attention=None), 30)


def test_join_is_the_mean_of_a_group():
    x = torch.randn(3, 20, 5, dtype=torch.double)
    weights = torch.rand(3, 20) + 0.1
    for r in (0, 1, 7, 10):
        found = merging.bipartite(x, r)
        want = merging.group_mean(x, found.moved, 20 - r, weights)
        torch.testing.assert_close(merging.join(x, found, weights), want, rtol=1e-5, atol=1e-6)


def test_published_schedules():
    tome = create("tome_tower", r=8)
    assert tome.schedule(576, None, 24, 22)[-1] == 576 - 23 * 8
    assert create("tome_tower", r=(4, 2)).schedule(9, None, 4, 3) == (5, 3, 3, 3)
    assert create("evit", rate=0.7).schedule(196, None, 12, 11)[::3] == (196, 139, 99, 71)
    assert create("pitome_tower", ratio=0.9).schedule(100, None, 3, 2) == (90, 81, 73)
    assert create("mctf", r=16).schedule(196, None, 12, 11)[-1] == 10


def test_inflection_bends_the_schedule():
    early = schedules.linear(100, 40, 6, -1.0)
    late = schedules.linear(100, 40, 6, 1.0)
    assert early[0] < schedules.linear(100, 40, 6)[0] == 90 < late[0]
    assert early[-1] == late[-1] == 40


def test_sta_needs_a_square():
    with pytest.raises(ConfigError, match="square map of patches, and there are 12"):
        create("sta").tokens_kept(12, 0.5)


@pytest.mark.parametrize(("keep", "k"), [(0.5, 288), (0.1, 48), (64, 64), (1, 1), (0.25, 144)])
def test_sta_counts_cells(keep: float | int, k: int):
    assert create("sta").tokens_kept(576, keep) == k


def test_pitome_as_released_for_clip():
    """Plain means of what plain bipartite matching of the states finds, up to half of the tower."""
    method, state = make("pitome_tower", {"faithful": True}), state_for(36)
    assert method.place == "after"
    assert not method.weighs_keys
    state = dataclasses.replace(state, mass=state.mass * 3)
    found = merging.bipartite(state.hidden, 6, protected=True)
    want = merging.group_mean(state.hidden, found.moved, 31)
    torch.testing.assert_close(method.reduce(6, state, 30).hidden, want)
    late = merging.behind(merging.crowded(state.hidden[:, 1:], 6, margin=0.9 * (1 - 7 / 12)), 1)
    want = merging.group_mean(state.hidden, late.moved, 31)
    torch.testing.assert_close(method.reduce(7, state, 30).hidden, want)


def test_page_rank_is_votes_handed_on():
    graph = torch.rand(1, 2, 6, 6).softmax(-1)
    want = []
    for head in graph[0].double():
        votes = [1.0] * 6
        for _ in range(3):
            votes = [sum(votes[i] * float(head[i, j]) for i in range(6)) for j in range(6)]
        want.append(torch.tensor(votes) / torch.tensor(votes).mean())
    heads = [w for w in want if 0.01 <= w.var(correction=0) <= 0.7] or want
    joined = torch.stack(heads).square().mean(0).sqrt()
    torch.testing.assert_close(page_rank(graph, 3)[0], joined.float())


def test_zero_tprune_drops_copies_of_important_tokens():
    """Of two equal halves, the one that is attended to less goes by likeness."""
    state = state_for(8, b=1, cls=0)
    k = state.attended().k.clone()
    k[:, :, 4:] = k[:, :, :4]
    q = torch.zeros_like(k)
    bias = torch.tensor([[2.0] * 4 + [0.0] * 4])
    state = dataclasses.replace(state, attention=TowerAttention(q, k, 1.0, bias=bias))
    kept = make("zero_tprune", {"similar": 1.0}).reduce(3, state, 4)
    assert kept.source.tolist() == [[0, 1, 2, 3]]


def test_zero_tprune_options():
    for rounds in ((1, 2), [1, 2, 3], 4):
        with pytest.raises(ConfigTypeError, match="give three ints"):
            ZeroTPrune(rounds=rounds)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        create("zero_tprune", rounds=(1, 0, 1))


def test_shares_of_small_towers_stay_within_what_is_read():
    assert create("evit").schedule(16, 4, 5, 3) == (16, 10, 6, 4)
    with pytest.raises(ConfigError, match="layer 4"):
        create("evit", layers=(4,)).schedule(16, 4, 5, 3)
