"""Streams of image, question and answer for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .questions import Question
from .scenes import Drawn, Split
from .worlds import world as find_world

_QUESTION_STREAM = 7  # keeps the questions' randomness apart from the drawing's


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        image: 224 x 224 RGB.
        scene_id: unique over all splits; questions of one scene share it.
        kind: one of `KINDS` or `TEXT_KINDS`.
        question: plain user text. answer: one word.
        object_coverage: ``[196]`` share of each patch covered by any object or text.
        asked_coverage: ``[196]`` the same for the asked objects only (all objects if the
            answer is no).
    """

    image: Image.Image
    scene_id: int
    kind: str
    question: str
    answer: str
    object_coverage: np.ndarray
    asked_coverage: np.ndarray


def _sample(drawn: Drawn, image: Image.Image, question: Question) -> Sample:
    asked = np.sum([drawn.items[i].coverage for i in question.about], axis=0)
    return Sample(
        image,
        drawn.scene_id,
        question.kind,
        question.text,
        question.answer,
        drawn.coverage,
        asked,
    )


def question_rng(split: Split, index: int) -> np.random.Generator:
    """The random stream of a scene's questions."""
    return np.random.default_rng([_QUESTION_STREAM, split.seed(index)])


def samples(
    split: str, n_questions: int, seed_offset: int = 0, *, world: str = "objects"
) -> Iterator[Sample]:
    """Questions with the kinds of a world in equal numbers.

    Each scene is asked at most one question of a kind, so that scenes of objects serve four to
    eight questions and text-heavy ones one to three. The stream depends on the arguments alone.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        n_questions: how many; the first kinds get one more if it is no multiple of their number.
        seed_offset: index of the first scene.
        world: ``"objects"`` (eight kinds, `KINDS`) or ``"text"`` (three kinds, `TEXT_KINDS`).

    Yields:
        Samples, scene by scene.

    Raises:
        ConfigError: for an unknown split or world.
    """
    chosen, sort = Split.named(split), find_world(world)
    share, rest = divmod(n_questions, len(sort.kinds))
    left = {kind: share + (i < rest) for i, kind in enumerate(sort.kinds)}
    index = seed_offset
    while any(left.values()):
        drawn, rng = sort.draw(chosen, index), question_rng(chosen, index)
        image = drawn.image
        index += 1
        for kind in sort.kinds:
            question = sort.ask(drawn, kind, rng)
            if question is not None and left[kind]:
                left[kind] -= 1
                yield _sample(drawn, image, question)
