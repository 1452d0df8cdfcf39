"""Paired differences: intervals, tests and their adjustment."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from eval_harness.pairs import holm, mcnemar, mean_by_image, sign_flip
from vlmcompress.core.errors import ConfigError


def test_one_question_per_image_is_scipys_bca():
    values = np.random.default_rng(1).exponential(size=40)
    found = mean_by_image(values, np.arange(40), seed=3)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(3)
    ).confidence_interval
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_questions_of_an_image_are_drawn_together():
    rng = np.random.default_rng(0)
    each = rng.integers(0, 2, 60).astype(float)
    alone = mean_by_image(each, np.arange(60))
    repeated = mean_by_image(np.repeat(each, 5), np.repeat(np.arange(60), 5))
    assert repeated == alone  # five times the same question adds nothing
    independent = mean_by_image(np.repeat(each, 5), np.arange(300))
    assert independent.high - independent.low < 0.6 * (alone.high - alone.low)


def test_intervals_cover_the_truth():
    """Nominally 95 % of them, of a skewed number with images of different sizes."""
    rng, hits = np.random.default_rng(7), 0
    for trial in range(60):
        sizes = rng.integers(1, 4, 50)
        values = np.repeat(rng.exponential(size=50), sizes)
        found = mean_by_image(values, np.repeat(np.arange(50), sizes), seed=trial)
        hits += found.low <= 1 <= found.high
    assert hits >= 51  # fewer come about once in a hundred times at 95 %


@pytest.mark.parametrize("images", [[0, 0, 0], [0, 1, 2]])
def test_no_width_without_differences(images):
    found = mean_by_image(np.zeros(3), np.array(images))
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_lengths_must_agree():
    with pytest.raises(ConfigError, match="one length above 0; got 2 and 3"):
        mean_by_image(np.zeros(2), np.zeros(3))
    with pytest.raises(ConfigError, match="one length above 0; got 0 and 0"):
        sign_flip(np.zeros(0), np.zeros(0))


def test_mcnemar_counts_the_questions_that_changed():
    one, other = np.array([1, 1, 1, 1, 1, 0, 0]), np.array([0, 0, 0, 0, 0, 1, 0])
    found = mcnemar(one, other)
    assert (found["gained"], found["lost"]) == (5, 1)
    assert found["p"] == pytest.approx(2 * 7 / 64)  # (C(6,0) + C(6,1)) / 2^6, two-sided
    assert mcnemar(one, one) == {"gained": 0, "lost": 0, "p": 1.0}


def test_sign_flip_is_mcnemar_with_one_question_per_image():
    rng = np.random.default_rng(2)
    one, other = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    assert sign_flip(one - other, np.arange(80)) == pytest.approx(mcnemar(one, other)["p"])


def test_sign_flip_of_images_that_move_together_is_the_weaker_test():
    difference, images = np.ones(24), np.repeat(np.arange(4), 6)
    assert sign_flip(difference, images) == pytest.approx(2 / 2**4)
    assert mcnemar(difference, np.zeros(24))["p"] < 1e-6


def test_sign_flip_tries_all_signs_of_few_images():
    difference, images = np.array([3.0, 2.0, -1.0]), np.arange(3)
    assert sign_flip(difference, images) == pytest.approx(4 / 8)  # +-(3+2+1), +-(3+2-1)
    assert sign_flip(np.zeros(3), images) == 1


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
