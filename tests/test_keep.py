"""What `keep` may be and how many tokens it keeps."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcompress.core.errors import ConfigError, ConfigTypeError, VLMCompressError
from vlmcompress.core.keep import AutoKeep, auto_count, count, parse_keep

QUICK = settings(max_examples=200, deadline=None)


@pytest.mark.parametrize(
    ("given_", "parsed"),
    [
        (0.1, 0.1),
        (1.0, 1.0),
        (5e-324, 5e-324),
        (1, 1),
        (10**9, 10**9),
        (np.float64(0.25), 0.25),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.int64(7), 7),
        (np.uint8(200), 200),
        (Fraction(1, 4), 0.25),
        ("auto", AutoKeep(0.9)),
        (AutoKeep(0.5), AutoKeep(0.5)),
    ],
)
def test_allowed(given_: object, parsed: object):
    assert parse_keep(given_) == parsed
    assert type(parse_keep(given_)) is type(parsed)


BAD_VALUES = [0, -1, 0.0, -0.5, 1.5, 1.0000001, math.nan, math.inf, -math.inf, np.float32("nan")]
BAD_VALUES += [np.int64(0), np.float64(2), "all", "", "0.5", "Auto"]


@pytest.mark.parametrize("keep", BAD_VALUES)
def test_bad_value(keep: object):
    with pytest.raises(ConfigError, match="allowed are a float in") as caught:
        parse_keep(keep)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, VLMCompressError)


@pytest.mark.parametrize(
    "keep", [True, False, np.bool_(True), None, [0.5], (1,), 1j, torch.tensor(0.5), b"auto", {}]
)
def test_bad_type(keep: object):
    with pytest.raises(ConfigTypeError, match="allowed are a float in") as caught:
        parse_keep(keep)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("tau", [0, -0.1, 1.1, math.nan])
def test_tau_is_a_share(tau: float):
    with pytest.raises(ConfigError, match="tau"):
        AutoKeep(tau)


@pytest.mark.parametrize("tau", [True, "0.9", None])
def test_tau_is_a_number(tau: object):
    with pytest.raises(ConfigTypeError, match="tau"):
        AutoKeep(tau)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "n", "kept"),
    [
        (0.1, 576, 58),
        (0.05, 576, 29),
        (0.5, 3, 2),  # halves go up
        (0.5, 5, 3),
        (1e-9, 576, 1),
        (0.999999, 576, 576),
        (1.0, 7, 7),
        (1, 576, 1),
        (577, 576, 576),
        (64, 576, 64),
    ],
)
def test_count(keep: float | int, n: int, kept: int):
    assert count(keep, n) == kept


@QUICK
@given(st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_count_of_a_fraction(keep: float, n: int):
    k = count(keep, n)
    assert k == min(n, max(1, math.floor(n * keep + 0.5)))
    assert 1 <= k <= n
    assert k <= count(min(1.0, keep * 1.1), n)


def slow_auto_count(scores: list[int], tau: Fraction) -> int:
    for k in range(1, len(scores)):
        if sum(sorted(scores)[-k:]) >= tau * sum(scores):
            return k
    return len(scores)


@QUICK
@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    st.integers(1, 100).map(lambda percent: Fraction(percent, 100)),
)
def test_auto_count(scores: list[int], tau: Fraction):
    (k,) = auto_count(torch.tensor([scores], dtype=torch.float32), float(tau)).tolist()
    assert k == slow_auto_count(scores, tau)


def test_auto_count_is_per_image():
    flat, peaked = torch.ones(100), torch.tensor([1e6] + [1e-6] * 99)
    counts = auto_count(torch.stack([flat, peaked, torch.zeros(100)]), 0.9)
    assert counts.tolist() == [90, 1, 1]
    assert counts.dtype == torch.int64
