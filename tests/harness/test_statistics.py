"""Intervals: golden values and the behaviour that reports rely on."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from eval_harness import statistics
from vlmcompress.core.errors import ConfigError, MissingExtraError

KINDS = np.array(["a", "b"] * 100)
IMAGES = np.arange(200) // 4


def _values(rate: float) -> np.ndarray:
    return (np.random.default_rng(0).random(200) < rate).astype(float)


def test_wilson_golden():
    found = statistics.proportion(8, 10)
    assert found.mean == 0.8
    assert found.low == pytest.approx(0.4901625, abs=1e-6)
    assert found.high == pytest.approx(0.9433178, abs=1e-6)


def test_wilson_at_the_edge():
    assert statistics.proportion(5, 5).high == pytest.approx(1)
    assert statistics.proportion(0, 5).low == pytest.approx(0)


def test_kinds_weigh_alike():
    values = np.array([1.0, 1.0, 1.0, 0.0])
    found = statistics.mean_over_kinds(values, np.array(["a", "a", "a", "b"]), np.arange(4))
    assert found.mean == 0.5


def test_interval_holds_the_mean_and_repeats():
    values = _values(0.7)
    first = statistics.mean_over_kinds(values, KINDS, IMAGES, seed=3)
    assert first.low < first.mean < first.high
    assert first == statistics.mean_over_kinds(values, KINDS, IMAGES, seed=3)
    assert 0.08 < first.high - first.low < 0.2


def test_many_rows_at_once_are_the_same():
    rows = [_values(rate) for rate in (0.2, 0.5, 0.9)] + [_values(0.5) - _values(0.9)]
    together = statistics.means_over_kinds(rows, KINDS, IMAGES, seed=2)
    assert together == [statistics.mean_over_kinds(row, KINDS, IMAGES, seed=2) for row in rows]
    with pytest.raises(ConfigError, match="one length"):
        statistics.means_over_kinds([rows[0], rows[1][:3]], KINDS, IMAGES)
    with pytest.raises(ConfigError, match="one length"):
        statistics.means_over_kinds([], KINDS, IMAGES)


def test_an_interval_is_that_of_resampled_images():
    values, drawn = _values(0.7), np.random.default_rng(1)
    means = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(i == IMAGES) for i in drawn.integers(0, 50, 50)])
        means.append(np.mean([values[rows][KINDS[rows] == kind].mean() for kind in "ab"]))
    found = statistics.mean_over_kinds(values, KINDS, IMAGES)
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.008)


def test_shared_images_widen_the_interval():
    values = np.repeat(_values(0.5)[:50], 4)
    clustered = statistics.mean_over_kinds(values, KINDS, IMAGES)
    independent = statistics.mean_over_kinds(values, KINDS, np.arange(200))
    assert clustered.high - clustered.low > 1.5 * (independent.high - independent.low)


def test_paired_difference_is_tighter_than_its_sides():
    one = _values(0.5)
    other = one.copy()
    other[:4] = 1 - other[:4]
    found = statistics.mean_over_kinds(other - one, KINDS, IMAGES)
    alone = statistics.mean_over_kinds(one, KINDS, IMAGES)
    assert found.high - found.low < 0.5 * (alone.high - alone.low)
    assert statistics.mean_over_kinds(one - one, KINDS, IMAGES).to_dict() == {
        "mean": 0.0,
        "low": 0.0,
        "high": 0.0,
    }


def test_all_right_is_no_special_case():
    found = statistics.mean_over_kinds(np.ones(200), KINDS, IMAGES)
    assert found == statistics.Estimate(1.0, 1.0, 1.0)


def test_one_image_has_no_interval():
    found = statistics.mean_over_kinds(np.array([1.0, 0.0]), KINDS[:2], np.zeros(2))
    assert found == statistics.Estimate(0.5, 0.5, 0.5)


def test_lengths_must_agree():
    with pytest.raises(ConfigError, match="got 2, 1 and 2"):
        statistics.mean_over_kinds(np.ones(2), KINDS[:1], IMAGES[:2])


def test_missing_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match=r"vlmcompress\[eval\]"):
        statistics.proportion(1, 2)
