"""What the search asks of the world: costs of pipelines, and scores of questions under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

SEARCH, HELD_OUT = "search", "held_out"
"""The two parts that the images are cut into: the first finds a pipeline, the second tests it."""


@dataclass(frozen=True)
class Cost:
    """What a pipeline costs.

    Attributes:
        share: of what the full model costs, the lower the better.
        value: what a ceiling is compared with: the share, or seconds.
        facts: JSON-ready, what it was taken from.
    """

    share: float
    value: float
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Scores of the questions of some images.

    Attributes:
        values: [questions] in [0, 1].
        images: [questions] number of the image of each.
    """

    values: np.ndarray
    images: np.ndarray

    @classmethod
    def together(cls, several: Sequence[Scores]) -> Scores:
        """Those of several ranges of images, one behind the other."""
        return cls(
            np.concatenate([one.values for one in several]),
            np.concatenate([one.images for one in several]),
        )

    def __len__(self) -> int:
        """Questions."""
        return len(self.values)


class Judge(Protocol):
    """Answers what the search asks; `models.ModelJudge` does it with a model."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Images of each part."""

    @property
    def widest(self) -> int:
        """Questions about the image that most are about, in both parts."""

    def costs(self, specs: Sequence[str]) -> Mapping[str, Cost | str]:
        """What pipelines cost, or why they cannot be run. Those that time does not allow lack."""

    def again(self, specs: Sequence[str]) -> Mapping[str, Sequence[float]]:
        """Fresh measurements of what a ceiling is compared with; one if it is no measurement."""

    def scores(self, spec: str | None, part: str, first: int, last: int) -> Scores:
        """Scores of the questions about images `first` to `last` of a part.

        Args:
            spec: the pipeline; None for the full model. What it refuses counts 0.
            part: `SEARCH` or `HELD_OUT`.
            first: number of the first image.
            last: number behind the last one.

        Raises:
            OutOfTime: where it cannot be asked in the time that is left.
        """
