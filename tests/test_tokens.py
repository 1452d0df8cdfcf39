"""Selecting tokens keeps rows, masses, assignments and evidence together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmcompress.core.tokens import Evidence, Segment, VisualTokens

QUICK = settings(max_examples=50, deadline=None)


def tokens_of(b: int, n: int) -> VisualTokens:
    """Units whose features and evidence spell out unit and row."""
    place = (100 * torch.arange(b)[:, None] + torch.arange(n)).float()
    attention = place[:, None].expand(b, 2, n)
    evidence = Evidence(
        {3: attention}, {4: attention}, {5: place[..., None, None].expand(b, n, 2, 4)}
    )
    return VisualTokens.from_features(place[..., None].expand(b, n, 3), evidence=evidence)


def rows_of(b: int, n: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(b)])


def check(tokens: VisualTokens) -> None:
    """Every part of `tokens` tells of the same uncompressed rows."""
    place = 100 * torch.arange(len(tokens.index))[:, None] + tokens.index
    for values in (
        tokens.features[..., 0],
        tokens.evidence.cls_attention[3][:, 1],
        tokens.evidence.received_attention[4][:, 0],
        tokens.evidence.keys[5][:, :, 1, 2],
    ):
        assert torch.equal(values.long(), place)
    assert tokens.assignment is not None
    for unit, index in zip(tokens.assignment, tokens.index, strict=True):
        wanted = torch.full((tokens.n_full,), -1)
        wanted[index] = torch.arange(tokens.n)
        assert torch.equal(unit, wanted)


def test_untouched():
    tokens = tokens_of(2, 5)
    assert (tokens.n, tokens.n_full) == (5, 5)
    assert tokens.assignment is None
    assert torch.equal(tokens.mass, torch.ones(2, 5))
    assert tokens.segments == (Segment("image", (1, 1, 5), slice(0, 5)),)
    assert tokens.owner.tolist() == [0, 1]
    assert not tokens.structural.any()


@QUICK
@given(st.integers(1, 3), st.integers(1, 12), st.data())
def test_selections_compose(b: int, n: int, data: st.DataObject):
    seed = data.draw(st.integers(0, 1000))
    k = data.draw(st.integers(1, n))
    j = data.draw(st.integers(1, k))
    first, second = rows_of(b, n, k, seed), rows_of(b, k, j, seed + 1)
    once = tokens_of(b, n).select(first)
    twice = once.select(second)
    assert (twice.n, twice.n_full) == (j, n)
    check(once)
    check(twice)
    direct = tokens_of(b, n).select(first.gather(1, second))
    assert torch.equal(twice.index, direct.index)
    assert torch.equal(twice.assignment, direct.assignment)  # type: ignore[arg-type]
    assert torch.equal(twice.mass, torch.ones(b, j))


def test_selection_after_a_merge_drops_whole_groups():
    merged = VisualTokens(
        features=torch.arange(3.0).view(1, 3, 1),
        index=torch.tensor([[0, 2, 5]]),
        mass=torch.tensor([[2.0, 3.0, 1.0]]),
        segments=(Segment("image", (1, 2, 3), slice(0, 6)),),
        owner=torch.tensor([0]),
        assignment=torch.tensor([[0, 0, 1, 1, 1, 2]]),
    )
    kept = merged.select(torch.tensor([[1, 2]]))
    assert kept.index.tolist() == [[2, 5]]
    assert kept.mass.tolist() == [[3.0, 1.0]]
    assert kept.assignment is not None
    assert kept.assignment.tolist() == [[-1, -1, 0, 0, 0, 1]]


def test_regrouping_twice_sums_masses_and_follows_every_token():
    tokens = tokens_of(1, 6)
    moved = torch.tensor([[0, 0, 1, -1, 1, 2]])
    source = torch.tensor([[1, 4, 5]])
    first = tokens.regroup(torch.zeros(1, 3, 3), source, moved)
    assert first.mass.tolist() == [[2, 2, 1]]
    assert first.index.tolist() == [[1, 4, 5]]
    assert first.assignment.tolist() == [[0, 0, 1, -1, 1, 2]]
    assert first.evidence.cls_attention[3][0, 0].tolist() == [1, 4, 5]
    again = first.regroup(torch.ones(1, 2, 3), torch.tensor([[0, 2]]), torch.tensor([[0, -1, 1]]))
    assert again.mass.tolist() == [[2, 1]]
    assert again.index.tolist() == [[1, 5]]
    assert again.assignment.tolist() == [[0, 0, -1, -1, -1, 1]]
    assert torch.equal(again.features, torch.ones(1, 2, 3))


def test_gradients_reach_kept_rows_only():
    features = torch.randn(1, 4, 2, requires_grad=True)
    VisualTokens.from_features(features).select(torch.tensor([[1, 3]])).features.sum().backward()
    assert features.grad is not None
    assert features.grad.sum(-1).tolist() == [[0.0, 2.0, 0.0, 2.0]]


def test_evidence_of_some_units():
    evidence = tokens_of(3, 4).evidence.take_units(torch.tensor([2]))
    assert evidence.cls_attention[3][0, 0, 0] == 200
    assert evidence.keys[5].shape == (1, 4, 2, 4)


def test_evidence_by_token_is_selected_and_that_of_the_image_stays():
    place = torch.arange(5.0)
    evidence = Evidence(
        text=torch.ones(1, 2, 3),
        wide_cls_attention={7: place.view(1, 1, 5)},
        cls_features=torch.full((1, 4), 9.0),
        patches=place.view(1, 5, 1).expand(1, 5, 3),
    )
    kept = evidence.select(torch.tensor([[3, 1]]))
    assert kept.wide_cls_attention[7].tolist() == [[[3, 1]]]
    assert kept.patches is not None
    assert kept.patches[0, :, 0].tolist() == [3, 1]
    assert kept.cls_features is evidence.cls_features
    assert kept.text is evidence.text
    units = evidence.take_units(torch.tensor([0, 0]))
    assert units.cls_features is not None
    assert units.cls_features.shape == (2, 4)


@pytest.mark.parametrize(("grid", "length"), [((1, 24, 24), 576), ((8, 3, 5), 120)])
def test_segment_length(grid: tuple[int, int, int], length: int):
    assert Segment("frame", grid, slice(0, length)).length == length
