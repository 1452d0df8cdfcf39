"""What selection computes in a roundabout way, for speed, equals its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.units import covering_by_definition, make
from vlmcompress.core.tokens import Evidence, VisualTokens
from vlmcompress.methods.ops import merging
from vlmcompress.methods.ops.diversity import cosine, covering, thin_out
from vlmcompress.methods.ops.topk import among_best, descending

KINDS = ("random", "duplicates", "ties")
SEEDS = range(4)


def features(kind: str, seed: int, *, b: int = 2) -> tuple[Tensor, torch.Generator]:
    """[b, n, 6] of a random n: all different, a third of them distinct, or of few values."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 150, (1,), generator=generator))
    values = torch.randn(b, n, 6, generator=generator)
    if kind == "duplicates":
        values = values[:, torch.randint(0, n // 3 + 1, (n,), generator=generator)]
    return values.round() if kind == "ties" else values, generator


def thin_out_by_definition(similarity: Tensor, order: list[int], k: int, at_once: int) -> list[int]:
    """Every round compares all, anew."""
    table = similarity.tolist()
    while len(order) > k:
        some, others = order[::2], order[1::2]
        redundancy = [max(table[i][j] for j in others) for i in some]
        worst = sorted(range(len(some)), key=lambda place: -redundancy[place])  # stable
        order = [some[i] for i in worst[min(at_once, len(order) - k) :]] + others
    return order


@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_thinning_is_that_of_the_definition(kind: str, seed: int, at_once: int):
    values, generator = features(kind, seed)
    similarity, n = cosine(values), values.shape[1]
    order = torch.rand(2, n, generator=generator).argsort(1)[:, n // 4 :]
    for k in {0, 1, order.shape[1] // 5, order.shape[1] // 2 + 1, order.shape[1]}:
        got = thin_out(similarity, order, k, at_once=at_once)
        for unit in range(2 if k else 0):
            rows = order[unit].tolist()
            want = thin_out_by_definition(similarity[unit], rows, k, at_once)
            assert got[unit].tolist() == want
        assert got.shape == (2, k)


def test_thinning_where_lists_of_neighbours_hold_nobody_to_compare_with():
    """Forty alike stand at even places, so that the nearest of each are never between them."""
    generator = torch.Generator().manual_seed(0)
    alike = torch.ones(40, 6) + 0.01 * torch.randn(40, 6, generator=generator)
    values = torch.stack([alike, torch.randn(40, 6, generator=generator)], 1).view(1, 80, 6)
    similarity, order = cosine(values), torch.arange(80)[None]
    for k in (79, 60, 7):
        want = thin_out_by_definition(similarity[0], list(range(80)), k, 8)
        assert thin_out(similarity, order, k)[0].tolist() == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_coverage_is_that_of_the_definition_also_when_nothing_is_left_to_gain(kind: str, seed: int):
    values, generator = features(kind, seed)
    similarity, n = cosine(values), values.shape[1]
    weights = torch.rand(2, n, generator=generator)
    got = covering(similarity, weights, n)
    for unit in range(2):
        assert got[unit].tolist() == covering_by_definition(similarity[unit], weights[unit], n)


def test_coverage_of_more_rows_than_are_corrected_together():
    values = torch.randn(1, 300, 5, generator=torch.Generator().manual_seed(2))
    similarity, weights = cosine(values), torch.ones(1, 300)
    want = covering_by_definition(similarity[0], weights[0], 90)
    assert covering(similarity, weights, 90)[0].tolist() == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_are_the_first_of_the_sorted(kind: str, seed: int):
    values, _ = features(kind, seed)
    scores = values @ values.transpose(1, 2)
    n = scores.shape[2]
    for k in (0, 1, n // 2, n):
        want = torch.zeros_like(scores, dtype=torch.bool)
        want.scatter_(2, descending(scores)[..., :k], True)
        assert torch.equal(among_best(scores, k), want)


@pytest.mark.parametrize("add", [merging._sum_by_index, merging._sum_by_product])
def test_sums_of_groups(add):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 50, 7, generator=generator)
    moved = torch.randint(-1, 9, (3, 50), generator=generator)
    got = add(rows, moved, 11)
    for unit in range(3):
        for group in range(11):
            want = rows[unit][moved[unit] == group].double().sum(0)
            torch.testing.assert_close(got[unit, group].double(), want, atol=1e-5, rtol=0)
        assert torch.equal(add(rows[unit : unit + 1], moved[unit : unit + 1], 11)[0], got[unit])


def test_gradients_of_sums_reach_the_rows_of_groups_only():
    rows = torch.ones(1, 4, 2, requires_grad=True)
    moved = torch.tensor([[0, -1, 1, 1]])
    merging.group_sum(rows, moved, 2, torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert rows.grad is not None
    assert rows.grad[0, :, 0].tolist() == [1, 0, 3, 4]


@pytest.mark.parametrize("neighbours", [0, 1, 5, 500])
@pytest.mark.parametrize("kind", KINDS)
def test_prumerge_adds_the_most_similar_of_all_tokens(kind: str, neighbours: int):
    """Neighbours by the whole matrix of cosines and a stable sort."""
    values, generator = features(kind, 3)
    keys = values[:, :, None]
    n, k = values.shape[1], 5
    row = torch.rand(2, 1, n, generator=generator)
    evidence = Evidence(keys={23: keys}, wide_cls_attention={23: row})
    tokens = VisualTokens.from_features(values, evidence=evidence)
    method = make("prumerge", {"neighbours": neighbours, "faithful": True})
    got = method.compress(tokens, k).features[:, :-1]
    similar = cosine(values)
    similar.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    near = descending(similar)[..., : min(neighbours, n - 1)]
    for unit in range(2):
        for place, token in enumerate(descending(row[:, 0])[unit, : k - 1].tolist()):
            others = near[unit, token]
            want = values[unit, token] + (row[unit, 0, others, None] * values[unit, others]).sum(0)
            torch.testing.assert_close(got[unit, place], want, atol=1e-5, rtol=1e-5)
