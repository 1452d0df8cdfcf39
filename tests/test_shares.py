"""Budgets are split exactly, and HiRED's follow the content."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcompress.core.errors import ConfigError, UnsupportedInputError
from vlmcompress.core.tokens import Evidence, VisualTokens
from vlmcompress.methods import pipeline
from vlmcompress.methods.connector.hired import HiRED
from vlmcompress.methods.ops.shares import apportion, at_least_one
from vlmcompress.methods.stages import run_stages


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_apportion_is_exact_and_within_limits(data):
    limits = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=6))
    n = len(limits)
    weights = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    total = data.draw(st.integers(0, sum(limits)))
    shares = apportion(total, weights, limits)
    assert sum(shares) == total
    assert all(0 <= share <= limit for share, limit in zip(shares, limits, strict=True))
    free = [limit > total for limit in limits]
    if any(weights) and all(free):  # no limit binds: nobody is further than one from his due
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - total * weight / sum(weights)) < 1


@pytest.mark.parametrize(
    ("total", "weights", "limits", "shares"),
    [
        (10, (1, 1, 2), (9, 9, 9), [3, 2, 5]),
        (10, (1, 0, 0), (4, 9, 3), [4, 5, 1]),
        (7, (0, 0), (3, 4), [3, 4]),
        (0, (1, 1), (5, 5), [0, 0]),
    ],
)
def test_apportion_examples(total, weights, limits, shares):
    assert apportion(total, weights, limits) == shares


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_at_least_one(shares):
    if sum(shares) < len(shares):
        return
    raised = at_least_one(shares)
    assert sum(raised) == sum(shares)
    assert min(raised) >= 1
    if min(shares) >= 1:
        assert raised == shares


def test_at_least_one_takes_from_the_largest():
    assert at_least_one([0, 5, 5, 0]) == [1, 4, 4, 1]


def _image(content: torch.Tensor, across: int = 2) -> VisualTokens:
    """A whole view of 4 x 4 and four tiles of 2 x 2, as packed (no newlines)."""
    row = torch.arange(1, 1 + across).repeat_interleave(2)
    tiles = torch.cat([row.repeat(2), (row + across).repeat(2)])
    tile = torch.cat([torch.zeros(16, dtype=torch.long), tiles])
    late = torch.linspace(1, 2, len(tile))
    early = torch.cat([content, torch.zeros(len(tiles))])
    evidence = Evidence(cls_attention={22: late[None, None], 0: early[None, None]})
    return VisualTokens.from_features(torch.zeros(1, len(tile), 1), tile=tile, evidence=evidence)


def _early(tokens: VisualTokens) -> torch.Tensor:
    return tokens.evidence.cls_attention[0][0, 0]


def test_budgets_follow_the_content_of_the_whole_view():
    """All content lies in the right half: the two tiles of that half get the budget."""
    content = torch.zeros(4, 4)
    content[:, 2:] = 1
    tokens = _image(content.flatten())
    budgets = HiRED().budgets(tokens.tile, _early(tokens), 12)
    assert budgets == [6, 0, 3, 0, 3]
    kept = HiRED().compress(tokens, 12)
    assert kept.n == 12
    assert torch.bincount(tokens.tile[kept.index[0]], minlength=5).tolist() == budgets


def test_the_released_code_sees_bands():
    content = torch.zeros(4, 4)
    content[:, 2:] = 1
    tokens = _image(content.flatten())
    assert HiRED(faithful=True).budgets(tokens.tile, _early(tokens), 12) == [6, 1, 1, 1, 1]


def test_what_tiles_cannot_take_goes_to_the_whole_view():
    tokens = _image(torch.rand(16, generator=torch.Generator().manual_seed(0)))
    assert sum(HiRED(alpha=0.1).budgets(tokens.tile, _early(tokens), 30)) == 30


def _views(tiles: int, b: int = 1) -> VisualTokens:
    """A whole view of 4 x 4 and tiles of 4 tokens, with any attention."""
    tile = torch.cat([torch.zeros(16, dtype=torch.long), torch.arange(1, tiles + 1).repeat(4)])
    rows = torch.rand(b, 1, len(tile), generator=torch.Generator().manual_seed(3))
    evidence = Evidence(cls_attention={22: rows, 0: rows})
    return VisualTokens.from_features(torch.zeros(b, len(tile), 1), tile=tile, evidence=evidence)


@pytest.mark.parametrize("tiles", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_any_number_of_tiles_and_of_tokens(tiles: int, k: int):
    tokens = _views(tiles)
    assert HiRED().compress(tokens, k).n == k
    if 16 % tiles:
        with pytest.raises(UnsupportedInputError, match=f"16 patches do not divide into {tiles}"):
            HiRED(faithful=True).compress(tokens, k)


def test_released_rounding_that_leaves_none():
    with pytest.raises(ConfigError, match="1 tokens come down to none"):
        HiRED(faithful=True).compress(_views(4), 1)


def test_what_released_rounding_loses_is_each_images_own():
    stages = pipeline.build("hired(faithful=True):9").stages
    tokens = _views(4, b=6)
    together = run_stages(stages, [tokens], 24)
    assert len({group.n for group in together}) > 1
    for group in together:
        (alone,) = run_stages(stages, [tokens.take_units(group.owner)], 24)
        assert torch.equal(alone.index, group.index)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_is_a_share(alpha):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        HiRED(alpha=alpha)
