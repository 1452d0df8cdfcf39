"""A judge that draws answers: pipelines whose costs and accuracies are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eval_harness.tune.judge import HELD_OUT, SEARCH, Cost, Scores

FULL_ACCURACY = 0.85


@dataclass(frozen=True)
class Known:
    """A pipeline.

    Attributes:
        cost: share of the full model's.
        kept: share of the full model's accuracy, in expectation.
        noise: share of the full model's wrong answers that it has right.
    """

    cost: float
    kept: float
    noise: float = 0.1

    @property
    def lost(self) -> float:
        """Probability that it is wrong where the full model is right."""
        gained = self.noise * (1 - FULL_ACCURACY)
        return 1 - self.kept + gained / FULL_ACCURACY


@dataclass
class Surface:
    """Answers at random; the questions of an image go together more often than not.

    Attributes:
        known: the pipelines.
        search: images of the search.
        held_out: images of the test.
        seed: of all draws.
        widest: questions of an image, at most.
        jitter: relative spread of timings.
        asked: questions that were asked.
    """

    known: Mapping[str, Known]
    search: int = 256
    held_out: int = 256
    seed: int = 0
    widest: int = 2
    jitter: float = 0.02
    asked: int = 0
    _full: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Draw images and the full model's answers."""
        draw = np.random.default_rng([self.seed, 0])
        for part, size in self.sizes.items():
            counts = draw.integers(1, self.widest + 1, size)
            images = np.repeat(np.arange(size), counts) + (part == HELD_OUT) * self.search
            easy = np.repeat(draw.beta(8.5, 1.5, size), counts)
            self._full[part] = (draw.random(len(images)) < easy).astype(float), images
        self._drawn: dict[tuple[str, str], np.ndarray] = {}

    @property
    def sizes(self) -> dict[str, int]:
        return {SEARCH: self.search, HELD_OUT: self.held_out}

    @property
    def questions(self) -> int:
        return sum(len(full) for full, _ in self._full.values())

    def costs(self, specs: Sequence[str]) -> dict[str, Cost | str]:
        return {s: Cost(self.known[s].cost, self.known[s].cost) for s in specs}

    def again(self, specs: Sequence[str]) -> dict[str, list[float]]:
        draw = np.random.default_rng([self.seed, 1])
        return {
            s: (self.known[s].cost * np.exp(self.jitter * draw.standard_normal(15))).tolist()
            for s in specs
        }

    def scores(self, spec: str | None, part: str, first: int, last: int) -> Scores:
        full, images = self._full[part]
        start = images[0]
        chosen = (images >= start + first) & (images < start + last)
        values = full if spec is None else self._of(spec, part)
        self.asked += int(chosen.sum())
        return Scores(values[chosen], images[chosen])

    def _of(self, spec: str, part: str) -> np.ndarray:
        if (spec, part) not in self._drawn:
            number = [*self.known].index(spec)
            draw = np.random.default_rng([self.seed, 2, number, part == HELD_OUT])
            full, one = self._full[part][0], self.known[spec]
            chance = np.where(full == 1, 1 - one.lost, one.noise)
            self._drawn[spec, part] = (draw.random(len(full)) < chance).astype(float)
        return self._drawn[spec, part]


def grid(qualities: Sequence[float], costs: Sequence[float]) -> dict[str, Known]:
    """Methods at budgets: what a method loses grows with what it saves.

    Args:
        qualities: of the methods; the better, the less they lose.
        costs: of the budgets.
    """
    return {
        f"m{i}:{cost}": Known(cost + 0.002 * i, 1 - 0.5 * (1 - cost) ** (1 + quality))
        for i, quality in enumerate(qualities)
        for cost in costs
    }
