"""What single methods between tower and LLM do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.units import QUICK, Grid, keeps, layouts, make, seeds, tokens_for
from vlmcompress.core.errors import ConfigTypeError
from vlmcompress.core.tokens import Segment, VisualTokens
from vlmcompress.methods import create
from vlmcompress.methods.ops import grid as grids
from vlmcompress.methods.ops.diversity import select
from vlmcompress.methods.ops.hashing import hashed


def test_random_depends_on_seed_and_length_only():
    features = VisualTokens.from_features(torch.randn(2, 576, 4))
    other = VisualTokens.from_features(torch.zeros(5, 576, 9, dtype=torch.bfloat16))
    kept = make("random", {"seed": 1}).compress(features, 58).index
    assert torch.equal(make("random", {"seed": 1}).compress(other, 58).index[:2], kept)
    assert not torch.equal(make("random", {"seed": 2}).compress(features, 58).index, kept)
    more = make("random", {"seed": 1}).compress(features, 100).index[0]
    assert set(kept[0].tolist()) < set(more.tolist())
    none, zero = make("random", {}), make("random", {"seed": 0})
    assert torch.equal(none.compress(features, 9).index, zero.compress(features, 9).index)


@pytest.mark.parametrize(
    ("seed", "numbers"),
    [
        (0, [125966810, 2011477445, 1603093752, 702745746]),
        (-(2**40) - 7, [1686611266, 1148296918, 237766821, 1489025700]),
    ],
)
def test_random_is_pinned(seed: int, numbers: list[int]):
    """Subsets of a seed stay what they are from release to release."""
    assert hashed(seed, 4, torch.device("cpu")).tolist() == numbers


def test_random_is_well_spread():
    """Inclusion frequencies of places, and of pairs of neighbours, over many seeds."""
    n, k, seeds = 96, 24, 3000
    chosen = torch.zeros(seeds, n)
    for seed in range(seeds):
        chosen[seed, hashed(seed, n, torch.device("cpu")).argsort()[:k]] = 1
    share, pair = k / n, k / n * (k - 1) / (n - 1)
    error = math.sqrt(share * (1 - share) / seeds)
    assert (chosen.mean(0) - share).abs().max() < 5 * error
    error = math.sqrt(pair * (1 - pair) / seeds)
    for lag in (1, 2, 32):
        assert ((chosen[:, lag:] * chosen[:, :-lag]).mean(0) - pair).abs().max() < 5 * error
    overlap = (chosen[1:] * chosen[:-1]).sum(1).mean()
    assert abs(overlap - k * share) < 0.25


def test_hashes_do_not_collide():
    assert hashed(5, 100_000, torch.device("cpu")).unique().numel() == 100_000


@pytest.mark.parametrize("seed", [True, 0.5, "1"])
def test_random_seed_must_be_an_int(seed: object):
    with pytest.raises(ConfigTypeError, match="seed"):
        create("random", seed=seed)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9, 16, 29, 58, 100, 144, 300, 433, 575])
def test_uniform_leaves_no_hole(k: int):
    """No token of a 24 x 24 grid is farther from a kept one than the mean spacing."""
    places = torch.tensor(grids.spread((1, 24, 24), k))
    every = torch.arange(576)[:, None]
    down, across = (every // 24 - places // 24).abs(), (every % 24 - places % 24).abs()
    assert torch.maximum(down, across).amin(1).max() <= 24 / math.sqrt(k)


def test_uniform_on_a_square_grid():
    places = grids.spread((1, 24, 24), 16)
    assert places == [24 * y + x for y in (3, 9, 15, 21) for x in (3, 9, 15, 21)]
    assert grids.spread((1, 1, 24), 3) == [4, 12, 20]


def test_uniform_spreads_over_frames():
    frames = [(1, 4, 4)] * 8
    tokens = tokens_for(make("uniform", {}), frames)
    kept = make("uniform", {}).compress(tokens, 4).index[0] // 16
    assert kept.diff().tolist() == [2, 2, 2]
    clip = grids.spread((8, 4, 4), 4)
    assert [place // 16 for place in clip] == [1, 3, 5, 7]


@QUICK
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.floats(0, 1))
def test_split_is_fair(lengths: list[int], share: float):
    k = round(share * sum(lengths))
    shares = grids.split(k, lengths)
    assert sum(shares) == k
    for part, length in zip(shares, lengths, strict=True):
        assert abs(part - k * length / sum(lengths)) < 1
        assert 0 <= part <= length


@pytest.mark.parametrize(
    ("grid", "k", "cells"),
    [
        ((1, 24, 24), 576, (1, 24, 24)),
        ((1, 24, 24), 144, (1, 12, 12)),
        ((1, 24, 24), 58, (1, 7, 8)),
        ((1, 24, 24), 2, (1, 1, 2)),
        ((1, 12, 24), 50, (1, 5, 10)),
        ((1, 24, 12), 50, (1, 10, 5)),
        ((1, 1, 30), 7, (1, 1, 7)),
        ((8, 4, 4), 32, (8, 2, 2)),
        ((8, 4, 4), 3, (3, 1, 1)),
        ((1, 4, 4), 0, (0, 0, 0)),
    ],
)
def test_pooled_grid(grid: Grid, k: int, cells: Grid):
    assert grids.nearest_grid(grid, k) == cells


@QUICK
@given(layout=layouts, keep=keeps, seed=seeds)
def test_pool_averages_its_assignment(layout: list[Grid], keep: float | int, seed: int):
    method = make("pool", {})
    tokens = tokens_for(method, layout, seed=seed)
    kept = method.compress(tokens, keep)
    if kept.assignment is None:
        return
    for cell in range(kept.n):
        rows = kept.assignment[0] == cell
        mean = tokens.features[:, rows].mean(1)
        torch.testing.assert_close(kept.features[:, cell], mean, rtol=1e-5, atol=1e-6)
    dropped = kept.assignment[0] < 0
    for segment in tokens.segments:  # a segment is dropped whole or not at all
        assert dropped[segment.slice].all() or not dropped[segment.slice].any()


def test_pool_equals_average_pooling():
    method = make("pool", {})
    tokens = tokens_for(method, [(1, 8, 12)])
    kept = method.compress(tokens, 24)
    image = tokens.features.transpose(1, 2).unflatten(2, (8, 12))
    pooled = torch.nn.functional.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(kept.features, pooled)
    assert kept.index[0, :7].tolist() == [0, 2, 4, 6, 8, 10, 24]
    assert (kept.mass == 4).all()


@pytest.mark.parametrize(
    ("name", "keep", "n", "k"),
    [
        ("divprune", 0.098, 576, 56),
        ("divprune", 0.5, 5, 2),  # half to even
        ("divprune", 0.001, 10, 1),
        ("divprune", 700, 576, 576),
        ("hired", 0.1, 576, 57),
        ("hired", 0.2, 576, 115),
        ("hired", 0.001, 10, 1),
        ("hired", 700, 576, 576),
        ("fastervlm", 0.1, 576, 58),
    ],
)
def test_documented_counts(name: str, keep: float | int, n: int, k: int):
    segments = (Segment("image", (1, 1, n), slice(0, n)),)
    assert make(name, {}).tokens_kept(segments, keep) == k


@QUICK
@given(st.integers(1, 24), st.integers(1, 6), st.data())
def test_divprune_never_repeats(n: int, distinct: int, data: st.DataObject):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    palette = torch.randn(distinct, 5, generator=generator)
    features = palette[torch.randint(distinct, (2, n), generator=generator)]
    order = select(features, n)
    assert order.sort(1).values.tolist() == [list(range(n))] * 2


def test_divprune_takes_one_of_each_first():
    palette = torch.eye(4)
    features = palette.repeat(3, 1)[None]
    assert sorted((select(features, 4) % 4)[0].tolist()) == [0, 1, 2, 3]
    assert select(torch.ones(1, 5, 3), 3).tolist() == [[0, 1, 2]]
    assert select(torch.zeros(1, 5, 3), 3).tolist() == [[0, 1, 2]]


def test_divprune_is_float32_under_autocast():
    features = torch.randn(2, 80, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = select(features, 30)
    assert torch.equal(inside, select(features, 30))
