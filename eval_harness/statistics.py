"""Intervals for proportions and for accuracies over questions that share images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.extras import require

if TYPE_CHECKING:
    import numpy as np

_RESAMPLES = 2000
_BATCH = 200  # resamples at once: bounds memory


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return asdict(self)


def tokdense(accuracy: float, tokens: float) -> float:
    """Accuracy per token: percent of questions, over visual tokens of a question's images.

    Source: VQToken (https://arxiv.org/abs/2503.16980).
    """
    return 100 * accuracy / tokens


def proportion(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson's score interval of a proportion of independent questions.

    Args:
        successes: right answers.
        n: questions, at least 1.
        confidence: level of the interval.
    """
    test = require("scipy.stats").binomtest(successes, n)
    interval = test.proportion_ci(confidence_level=confidence, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high))


def mean_over_kinds(
    values: np.ndarray,
    kinds: np.ndarray,
    images: np.ndarray,
    *,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """The unweighted mean over kinds of each kind's mean, with a percentile bootstrap over images.

    Questions of one image are drawn together, so their dependence widens the interval. Given the
    differences of two methods on the same questions, the comparison is paired.

    Args:
        values: [n] one number per question (0 or 1, or a difference of two).
        kinds: [n] kind of each question.
        images: [n] image of each question.
        seed: of the resampling.
        confidence: level of the interval.

    Raises:
        ConfigError: without questions, or when the lengths differ.
    """
    (found,) = means_over_kinds([values], kinds, images, seed=seed, confidence=confidence)
    return found


def means_over_kinds(
    rows: Sequence[np.ndarray],
    kinds: np.ndarray,
    images: np.ndarray,
    *,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[Estimate]:
    """`mean_over_kinds` of many rows of values of the same questions, with one resampling.

    Args:
        rows: [n] numbers each.
        kinds: [n] kind of each question.
        images: [n] image of each question.
        seed: of the resampling.
        confidence: level of the intervals.

    Raises:
        ConfigError: without questions, or when the lengths differ.
    """
    import numpy as np

    lengths = {len(row) for row in rows} or {0}
    if not {len(kinds)} == {len(images)} == lengths or not len(kinds):
        raise ConfigError(
            "values, kinds and images need one length above 0; "
            f"got {', '.join(map(str, sorted(lengths)))}, {len(kinds)} and {len(images)}."
        )
    sums, counts = _tables(np.stack(rows).astype(float), kinds, images)
    points = (sums.sum(0) / counts.sum(0)).mean(-1)
    if len(counts) < 2:
        return [Estimate(point, point, point) for point in points.tolist()]
    result = require("scipy.stats").bootstrap(
        (np.arange(len(counts)),),
        lambda drawn, axis=-1: _resampled(drawn, sums, counts),
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval.low, result.confidence_interval.high
    return [Estimate(*map(float, values)) for values in zip(points, low, high, strict=True)]


def _tables(
    rows: np.ndarray, kinds: np.ndarray, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums [images, rows, kinds] and counts [images, kinds] of values [rows, questions]."""
    import numpy as np

    kind_names, kind = np.unique(kinds, return_inverse=True)
    image_names, image = np.unique(images, return_inverse=True)
    counts = np.zeros((len(image_names), len(kind_names)))
    sums = np.zeros((*counts.shape, len(rows)))
    np.add.at(sums, (image, kind), rows.T)
    np.add.at(counts, (image, kind), 1)
    return sums.swapaxes(1, 2), counts


def _resampled(drawn: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[rows, ...] means over kinds of drawn images [..., images]; kinds not drawn are left out."""
    import numpy as np

    size = len(counts)
    flat = drawn.reshape(-1, size)
    places = flat + size * np.arange(len(flat))[:, None]
    times = np.bincount(places.ravel(), minlength=flat.size).reshape(flat.shape).astype(float)
    total = np.tensordot(times, sums, axes=1)
    n = (times @ counts)[:, None]
    means = np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0)
    return np.nanmean(means, axis=-1).T.reshape(-1, *drawn.shape[:-1])
