"""Two methods on the same questions: the difference with its interval, and tests of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eval_harness.statistics import Estimate
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.extras import require

if TYPE_CHECKING:
    import numpy as np

_RESAMPLES = 2000
_FLIPS = 9999
_BATCH = 100  # resamples at once: bounds memory


def mean_by_image(
    values: np.ndarray, images: np.ndarray, *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """The mean over questions, with a BCa bootstrap over images.

    Bias-corrected and accelerated (Efron 1987, doi:10.1080/01621459.1987.10478410), by scipy.
    Questions of one image are drawn together, so that their dependence widens the interval. Given
    the differences of two methods on the same questions, the comparison is paired.

    Args:
        values: [n] one number per question.
        images: [n] image of each.
        seed: of the resampling.
        confidence: level of the interval.

    Returns:
        The estimate; without a width where there is one image, or all images say the same.

    Raises:
        ConfigError: without questions, or when the lengths differ.
    """
    import numpy as np

    sums, counts = _by_image(values, images)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2 or np.ptp(sums / counts) == 0:
        return Estimate(mean, mean, mean)
    result = require("scipy.stats").bootstrap(
        (np.arange(len(sums)),),
        lambda drawn, axis=-1: sums[drawn].sum(axis) / counts[drawn].sum(axis),
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        method="BCa",
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    return Estimate(
        mean, float(result.confidence_interval.low), float(result.confidence_interval.high)
    )


def sign_flip(difference: np.ndarray, images: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p of no difference: the signs of whole images are flipped at random.

    With one question per image and scores of 0 and 1 this is McNemar's exact test, and is computed
    as such.

    Args:
        difference: [n] score of one method minus that of the other.
        images: [n] image of each question.
        seed: of the signs, where they are too many to try all.

    Raises:
        ConfigError: without questions, or when the lengths differ.
    """
    import numpy as np

    sums, _ = _by_image(difference, images)
    moved = sums[sums != 0]
    if not len(moved):
        return 1.0
    if np.ptp(np.abs(moved)) == 0:  # only how often each sign comes up matters
        return _binomial(int((moved > 0).sum()), len(moved))
    result = require("scipy.stats").permutation_test(
        (moved,),
        lambda x, axis=-1: x.sum(axis),
        permutation_type="samples",
        n_resamples=_FLIPS,
        batch=_BATCH,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def mcnemar(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """McNemar's exact test of two methods whose scores are 0 or 1.

    It takes questions as independent of each other, also those of one image.

    Args:
        one: [n] scores of a method.
        other: [n] scores of the one it is compared with.

    Returns:
        `gained` (right where the other is wrong), `lost` (the reverse) and `p`, two-sided.
    """
    gained, lost = int((one > other).sum()), int((one < other).sum())
    p = _binomial(gained, gained + lost) if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "p": p}


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values of one family of tests (Holm 1979, https://www.jstor.org/stable/4615733).

    In rising order, the i-th of m is multiplied by m - i + 1; none is below one before it, and none
    above 1.
    """
    adjusted, floor = [0.0] * len(ps), 0.0
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    for rank, place in enumerate(order):
        floor = max(floor, min(1.0, ps[place] * (len(ps) - rank)))
        adjusted[place] = floor
    return adjusted


def _binomial(successes: int, n: int) -> float:
    return float(require("scipy.stats").binomtest(successes, n).pvalue)


def _by_image(values: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of questions of each image."""
    import numpy as np

    if len(values) != len(images) or not len(values):
        raise ConfigError(
            f"values and images need one length above 0; got {len(values)} and {len(images)}."
        )
    _, image = np.unique(images, return_inverse=True)
    return np.bincount(image, weights=np.asarray(values, dtype=float)), np.bincount(image)
