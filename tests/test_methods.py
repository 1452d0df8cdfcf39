"""What every method between tower and LLM promises."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.methods_list import CONNECTOR_METHODS
from tests.units import (
    DEPTH,
    HEADS,
    QUICK,
    WIDTH,
    Grid,
    keeps,
    layouts,
    make,
    seeds,
    segments_of,
    tokens_for,
)
from vlmcompress.core.errors import (
    ConfigError,
    ConfigTypeError,
    EvidenceError,
    UnsupportedInputError,
)
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods import TokenPruner, create, get
from vlmcompress.methods.base import resolve_layer

every_method = pytest.mark.parametrize(("name", "options"), CONNECTOR_METHODS)
scored_methods = pytest.mark.parametrize(
    ("name", "options"), [m for m in CONNECTOR_METHODS if get(m[0]).scored]
)


def cast(tokens: VisualTokens, dtype: torch.dtype) -> VisualTokens:
    evidence = tokens.evidence._map(lambda x: x.to(dtype))
    return dataclasses.replace(tokens, features=tokens.features.to(dtype), evidence=evidence)


def unit(tokens: VisualTokens, i: int) -> VisualTokens:
    rows = torch.tensor([i])
    return VisualTokens.from_features(
        tokens.features[rows],
        segments=tokens.segments,
        evidence=tokens.evidence.take_units(rows),
    )


def permuted(tokens: VisualTokens, order: Tensor) -> VisualTokens:
    rows = order.expand(len(tokens.features), -1)
    return VisualTokens.from_features(
        tokens.features[:, order],
        segments=tokens.segments,
        evidence=tokens.evidence.select(rows),
    )


@every_method
@QUICK
@given(layout=layouts, keep=keeps, seed=seeds)
def test_count_and_order(
    name: str, options: dict[str, Any], layout: list[Grid], keep: float | int, seed: int
):
    method = make(name, options)
    tokens = tokens_for(method, layout, seed=seed)
    kept = method.compress(tokens, keep)
    k = method.tokens_kept(tokens.segments, keep)
    assert 1 <= k <= tokens.n
    assert kept.n == k
    assert kept.features.shape == (2, k, WIDTH)
    assert kept.features.dtype == tokens.features.dtype
    assert kept.index.shape == kept.mass.shape == (2, k)
    assert kept.index.dtype == torch.int64
    assert (kept.index.diff(dim=1) > 0).all()
    assert kept.index.min() >= 0
    assert kept.index.max() < tokens.n
    assert kept.n_full == tokens.n


@every_method
@QUICK
@given(grids=st.lists(layouts, min_size=1, max_size=4), keep=keeps)
def test_shares_of_one_budget(
    name: str, options: dict[str, Any], grids: list[list[Grid]], keep: float | int
):
    method = make(name, options)
    units = [segments_of(layout) for layout in grids]
    sizes = [sum(s.length for s in unit) for unit in units]
    total = method.nominal(sum(sizes), keep)
    if isinstance(keep, int) and total < len(units):
        with pytest.raises(UnsupportedInputError, match="at least one token"):
            method.allocate(units, keep)
        return
    shares = method.allocate(units, keep)
    assert sum(shares) == max(total, len(units))
    assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))
    for share, size in zip(shares, sizes, strict=True):
        due = sum(shares) * size / sum(sizes)
        assert abs(share - due) < 1 or min(shares) == 1


@every_method
@QUICK
@given(layout=layouts, keep=keeps, seed=seeds)
def test_assignment_agrees(
    name: str, options: dict[str, Any], layout: list[Grid], keep: float | int, seed: int
):
    method = make(name, options)
    tokens = tokens_for(method, layout, seed=seed)
    kept = method.compress(tokens, keep)
    if kept.assignment is None:
        assert kept.n == tokens.n
        return
    for assignment, index, mass in zip(kept.assignment, kept.index, kept.mass, strict=True):
        assert torch.equal(assignment[index], torch.arange(kept.n))
        assert torch.equal(torch.bincount(assignment[assignment >= 0]).float(), mass)
    for attention in kept.evidence.cls_attention.values():
        assert attention.shape == (2, HEADS, kept.n)


@every_method
@pytest.mark.parametrize("keep", [1.0, 60, 10**6])
def test_keeping_all_is_identity(name: str, options: dict[str, Any], keep: float | int):
    method = make(name, options)
    tokens = tokens_for(method, [(1, 5, 6), (2, 3, 5)])
    kept = method.compress(tokens, keep)
    assert torch.equal(kept.features, tokens.features)
    assert torch.equal(kept.index, tokens.index)
    assert torch.equal(kept.mass, tokens.mass)


@every_method
@QUICK
@given(layout=layouts, keep=keeps, seed=seeds)
def test_batch_is_its_units_alone(
    name: str, options: dict[str, Any], layout: list[Grid], keep: float | int, seed: int
):
    method = make(name, options)
    tokens = tokens_for(method, layout, b=3, seed=seed)
    batch = method.compress(tokens, keep)
    for i in range(3):
        alone = method.compress(unit(tokens, i), keep)
        assert torch.equal(alone.index[0], batch.index[i])
        assert torch.equal(alone.mass[0], batch.mass[i])
        torch.testing.assert_close(alone.features[0], batch.features[i], rtol=0, atol=1e-6)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, options: dict[str, Any], dtype: torch.dtype):
    method = make(name, options)
    tokens = cast(tokens_for(method, [(1, 6, 6)]), dtype)
    half, full = method.compress(tokens, 0.3), method.compress(cast(tokens, torch.float32), 0.3)
    assert half.features.dtype == dtype
    assert half.mass.dtype == torch.float32
    assert torch.equal(half.index, full.index)
    assert torch.equal(half.features, full.features.to(dtype))


@every_method
def test_global_random_state_is_left_alone(name: str, options: dict[str, Any]):
    method = make(name, options)
    tokens = tokens_for(method, [(1, 6, 6)])
    before = torch.get_rng_state()
    first = method.compress(tokens, 0.3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(method.compress(tokens, 0.3).features, first.features)


@every_method
def test_after_an_earlier_method(name: str, options: dict[str, Any]):
    method = make(name, options)
    tokens = tokens_for(method, [(1, 6, 6)])
    thinned = tokens.select(torch.arange(0, 36, 2).expand(2, -1))
    if name in ("pool", "m3"):
        with pytest.raises(ConfigError, match=f"18 of 36 tokens; put {name} first"):
            method.compress(thinned, 0.5)
        return
    kept = method.compress(thinned, 0.5)
    assert kept.n == 9
    assert (kept.index % 2 == 0).all()
    assert (kept.index.diff(dim=1) > 0).all()


@every_method
def test_evidence_layers_resolve(name: str, options: dict[str, Any]):
    needs = make(name, options).needs()
    layers = (*needs.cls_attention, *needs.received_attention, *needs.keys)
    assert all(0 <= resolve_layer(layer, DEPTH) < DEPTH for layer in layers)
    assert make(name, {}).needs() == get(name)().needs()


@every_method
def test_options_round_trip(name: str, options: dict[str, Any]):
    method = make(name, options)
    assert create(name, **method.options()) == method
    assert type(method).name == name


@every_method
def test_gradients_flow(name: str, options: dict[str, Any]):
    method = make(name, options)
    tokens = tokens_for(method, [(1, 4, 4)])
    features = tokens.features.clone().requires_grad_()
    kept = method.compress(dataclasses.replace(tokens, features=features), 0.5)
    kept.features.sum().backward()
    assert features.grad is not None
    reached = (features.grad.abs().sum(-1) > 0).sum(1)
    assert kept.assignment is not None
    assert torch.equal(reached, (kept.assignment >= 0).sum(1))


# --- methods with scores ----------------------------------------------------------------------


@scored_methods
@QUICK
@given(layout=layouts, keep=keeps, seed=seeds)
def test_order_of_tokens_does_not_matter(
    name: str, options: dict[str, Any], layout: list[Grid], keep: float | int, seed: int
):
    method = make(name, options)
    assert isinstance(method, TokenPruner)
    tokens = tokens_for(method, layout, seed=seed)
    scores = method.score(tokens)
    assert scores.dtype == torch.float32
    assert (scores >= 0).all()
    gaps = scores.sort(1).values.diff(dim=1)
    assume(gaps.numel() == 0 or gaps.min() > 1e-7)
    order = torch.randperm(tokens.n, generator=torch.Generator().manual_seed(seed))
    straight = method.compress(tokens, keep).index
    mixed = order[method.compress(permuted(tokens, order), keep).index]
    assert torch.equal(mixed.sort(1).values, straight)


@scored_methods
def test_ties_go_to_the_lower_index(name: str, options: dict[str, Any]):
    method = make(name, options)
    tokens = tokens_for(method, [(1, 4, 5)])
    equal = dataclasses.replace(tokens, evidence=tokens.evidence._map(torch.ones_like))
    assert method.compress(equal, 7).index.tolist() == [list(range(7))] * 2


@scored_methods
def test_missing_evidence_is_an_error(name: str, options: dict[str, Any]):
    tokens = VisualTokens.from_features(torch.zeros(1, 4, 2))
    with pytest.raises(EvidenceError):
        make(name, options).compress(tokens, 2)


@pytest.mark.parametrize(("name", "option"), [("fastervlm", "layer"), ("hired", "layer")])
@pytest.mark.parametrize("layer", [True, "last", None])
def test_layer_of_wrong_type(name: str, option: str, layer: object):
    with pytest.raises(ConfigTypeError, match="must be an int or a float"):
        create(name, **{option: layer})


@pytest.mark.parametrize("name", ["vtc_cls", "received_attention"])
def test_bad_layers(name: str):
    with pytest.raises(ConfigError, match="at least one layer"):
        create(name, layers=())
    with pytest.raises(ConfigTypeError, match="must be a tuple"):
        create(name, layers=-2)
    with pytest.raises(ConfigError, match="share of depth"):
        create(name, layers=(1.5,))


@pytest.mark.parametrize(
    ("layer", "depth", "index"), [(-2, 24, 22), (0, 24, 0), (0.5, 24, 12), (0.999, 24, 23)]
)
def test_resolve_layer(layer: float | int, depth: int, index: int):
    assert resolve_layer(layer, depth) == index


@pytest.mark.parametrize("layer", [24, -25])
def test_layer_that_does_not_exist(layer: int):
    with pytest.raises(ConfigError, match="24 layers"):
        resolve_layer(layer, 24)
