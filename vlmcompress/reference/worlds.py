"""The two worlds of scenes: plain objects, and texts; each with its kinds of questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmcompress.core.errors import ConfigError

from .questions import ANSWERS, KINDS, Question, ask
from .scenes import GLYPH_NAMES, Drawn, Split, scene
from .sprites import DIGITS
from .text_questions import TEXT_KINDS, ask_text
from .text_scenes import LETTERS, text_scene

MOST_ITEMS = 16  # no scene of any world has more
ALL_KINDS = (*KINDS, *TEXT_KINDS)


@dataclass(frozen=True)
class World:
    """One sort of scenes and what is asked about them.

    Attributes:
        name: of the world.
        draw: from a split and an index to a scene.
        kinds: of questions.
        ask: from a scene, a kind and a random generator to a question or None.
    """

    name: str
    draw: Callable[[Split, int], Drawn]
    kinds: tuple[str, ...]
    ask: Callable[[Any, str, np.random.Generator], Question | None]


OBJECTS = World("objects", scene, KINDS, ask)
TEXTS = World("text", text_scene, TEXT_KINDS, ask_text)
WORLDS = {world.name: world for world in (OBJECTS, TEXTS)}


def world(name: str) -> World:
    """Find a world by its name.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in WORLDS:
        raise ConfigError(f"world {name!r}: allowed are {', '.join(WORLDS)}")
    return WORLDS[name]


def chance(kind: str) -> float:
    """How often a guess among the possible answers of a question is right."""
    if kind == "sign":
        lengths = range(LETTERS[0], LETTERS[1] + 1)
        return float(np.mean([len(GLYPH_NAMES) ** -n for n in lengths]))
    if kind == "cell":
        return 1 / len(DIGITS)
    if kind == "largest":
        return 1 / len(GLYPH_NAMES)
    return 1 / (2 if kind == "relation" else len(ANSWERS[kind]))
