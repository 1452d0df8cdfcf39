"""Intervals for proportions and for accuracies over questions that share images."""

from __future__ import annotations

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
    import numpy as np

    if not len(values) == len(kinds) == len(images) > 0:
        raise ConfigError(
            "values, kinds and images need one length above 0; "
            f"got {len(values)}, {len(kinds)} and {len(images)}."
        )
    sums, counts = _tables(np.asarray(values, dtype=float), kinds, images)
    point = float((sums.sum(0) / counts.sum(0)).mean())
    if len(sums) < 2:
        return Estimate(point, point, point)
    result = require("scipy.stats").bootstrap(
        (np.arange(len(sums)),),
        lambda rows, axis=-1: _resampled(sums[rows], counts[rows]),
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Estimate(point, float(interval.low), float(interval.high))


def _tables(
    values: np.ndarray, kinds: np.ndarray, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of the values, both [images, kinds]."""
    import numpy as np

    kind_names, kind = np.unique(kinds, return_inverse=True)
    image_names, image = np.unique(images, return_inverse=True)
    shape = (len(image_names), len(kind_names))
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (image, kind), values)
    np.add.at(counts, (image, kind), 1)
    return sums, counts


def _resampled(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over kinds of resampled tables [..., images, kinds]; kinds not drawn are left out."""
    import numpy as np

    total, n = sums.sum(-2), counts.sum(-2)
    means = np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0)
    return np.nanmean(means, axis=-1)
