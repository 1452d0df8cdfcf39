"""The statistics of a search: intervals that drop pipelines, and tests that certify one.

A pipeline keeps a share f of the full model's score where the mean over questions of
`score - f * score of the full model` (its margin) is not below 0. The search looks at bootstrapped
intervals of margins; they decide what is asked next and nothing else.

What is chosen is certified by betting against "it is not admissible" (Waudby-Smith and Ramdas 2024,
https://doi.org/10.1093/jrsssb/qkad009, section 4): a wealth of 1 is multiplied, image by image, by
1 + stake * margin of the image / largest possible loss. As long as margins are not above 0 on
average, no stake makes the wealth grow, so that it ever reaches 1 / alpha with probability alpha at
most (Ville). This holds for any number of images and at whatever moment one stops, also where not
one answer differs, from which a bootstrap would conclude that none ever does. Several stakes are
played at once, one of which is chosen by what the search has seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from eval_harness.statistics import Estimate, means_over_kinds
from eval_harness.tune.judge import Scores
from vlmcompress.core.extras import require

_STAKES = np.array([0.99, 0.5, 0.25, 0.12, 0.06, 0.03])
_TRIED = np.linspace(0.03, 0.99, 33)  # stakes that the search's images are tried with
_RESAMPLES = 400
_STEP = 0.005  # of floors that are told


def estimates(
    rows: list[np.ndarray], images: np.ndarray, *, confidence: float, seed: int
) -> list[Estimate]:
    """Mean of each row of margins, with a bootstrap over images that all rows share.

    Args:
        rows: [questions] margins each.
        images: [questions] image of each.
        confidence: level of the intervals.
        seed: of the resampling.
    """
    kinds = np.zeros(len(images))
    return means_over_kinds(rows, kinds, images, seed=seed, confidence=confidence)


@dataclass(frozen=True)
class Paired:
    """A pipeline and the full model on the same questions, image by image.

    Attributes:
        scores: [images] sum of the pipeline's scores.
        full: [images] sum of the full model's.
        counts: [images] questions.
    """

    scores: np.ndarray
    full: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, scores: Scores, full: Scores) -> Paired:
        """From the scores of the same questions in the same order."""
        _, image = np.unique(full.images, return_inverse=True)
        return cls(
            np.bincount(image, weights=scores.values),
            np.bincount(image, weights=full.values),
            np.bincount(image),
        )

    @property
    def kept(self) -> float:
        """Share of the full model's score; 1 where that is 0."""
        return float(self.scores.sum() / self.full.sum()) if self.full.any() else 1.0

    def stakes(self, floor: float, widest: int) -> np.ndarray:
        """[images] margins over the largest possible loss, all of them -1 or more.

        Args:
            floor: share of the full model's score.
            widest: questions of the image that has most.
        """
        return (self.scores - floor * self.full) / (floor * widest)


@dataclass(frozen=True)
class Bets:
    """Stakes that are played at once.

    Attributes:
        stakes: [stakes] each below 1.
        weights: [stakes] what each has at the beginning; they sum to 1.
    """

    stakes: np.ndarray
    weights: np.ndarray

    @classmethod
    def after(cls, seen: np.ndarray) -> Bets:
        """The stake that would have grown best on images seen before, and fixed ones.

        Args:
            seen: [images] `Paired.stakes` of the search. One lost image is put to them, since a
                pipeline that has lost none may.
        """
        grown = np.log1p(np.outer(_TRIED, np.append(seen, -1.0))).sum(1)
        best = _TRIED[grown.argmax()]
        fixed = np.full(len(_STAKES), 0.5 / len(_STAKES))
        return cls(np.append(_STAKES, best), np.append(fixed, 0.5))

    def wealth(self, images: np.ndarray) -> np.ndarray:
        """[images] logarithm of the wealth after each image."""
        grown = np.log1p(np.outer(self.stakes, images)).cumsum(1)
        return np.asarray(np.logaddexp.reduce(grown + np.log(self.weights)[:, None], axis=0))

    def p(self, images: np.ndarray) -> float:
        """Of "not admissible": 1 / largest wealth up to here, at most 1; valid at any moment."""
        if not len(images):
            return 1.0
        return float(np.exp(-max(0.0, self.wealth(images).max())))

    def power(self, seen: np.ndarray, size: int, level: float, seed: int) -> float:
        """How often as many images as there are to test would certify the pipeline.

        Args:
            seen: [images] of the search; resampled, with one lost image put to them.
            size: images of the test.
            level: largest p that certifies.
            seed: of the resampling.
        """
        pool = np.append(seen, -1.0)
        chances = np.append(np.full(len(seen), 1 / (len(seen) + 0.5)), 0.5 / (len(seen) + 0.5))
        drawn = np.random.default_rng(seed).multinomial(size, chances, size=_RESAMPLES)
        grown = drawn @ np.log1p(np.outer(self.stakes, pool)).T
        ends = np.logaddexp.reduce(grown + np.log(self.weights), axis=1)
        return float((ends >= -math.log(level)).mean())


def share_kept(searched: Paired, tested: Paired, widest: int, level: float) -> float:
    """Lower bound of the share of the full model's score that a pipeline keeps.

    All floors up to it, in steps of 0.005, are refused as its true share at this level.

    Args:
        searched: images of the search, which set the stakes.
        tested: images that were asked for the test.
        widest: questions of the image that has most.
        level: probability that the bound is wrong, at most.

    Returns:
        In [0, 1.5]; 0 where nothing can be said.
    """
    if not len(tested.counts):
        return 0.0
    low = 0.0
    for number in range(1, round(1.5 / _STEP) + 1):
        floor = number * _STEP
        bets = Bets.after(searched.stakes(floor, widest))
        if bets.p(tested.stakes(floor, widest)) > level:
            break
        low = floor
    return round(low, 3)


def images_needed(full: np.ndarray, floor: float, widest: int, level: float) -> int | None:
    """Images that certify a pipeline whose answers are all those of the full model.

    Fewer cannot certify anything but a pipeline that is better than the full model: that none of n
    images was lost says only that not many more than 1 of n are. The search has seen as many.

    Args:
        full: [images] sums of the full model's scores.
        floor: share of them that must be kept.
        widest: questions of the image that has most.
        level: largest p that certifies.

    Returns:
        Within 2 %; None where no number is enough, as the full model is never right.
    """
    if not full.any():
        return None
    stakes = Paired(full, full, np.ones(len(full))).stakes(floor, widest)
    tried, fixed = (np.log1p(np.outer(s, stakes)).mean(1) for s in (_TRIED, _STAKES))
    n, wealth = 0, 0.0
    while wealth < -math.log(level):
        n += 1 + n // 50
        best = (n * tried + np.log1p(-_TRIED)).argmax()
        chosen, others = n * tried[best], np.logaddexp.reduce(n * fixed - math.log(len(fixed)))
        wealth = np.logaddexp(chosen, others) - math.log(2)
    return n


def below(values: list[float], ceiling: float) -> float:
    """The sign test of "the median is above the ceiling": p, one-sided and exact.

    Args:
        values: fresh measurements, independent of those that led here.
        ceiling: what they must not be above.
    """
    under = sum(value <= ceiling for value in values)
    test = require("scipy.stats").binomtest(under, len(values), alternative="greater")
    return float(test.pvalue)
