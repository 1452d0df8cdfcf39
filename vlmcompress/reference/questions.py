"""Eight kinds of questions about a scene, phrased so that a blind answerer is at chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scenes import COLOUR_NAMES, SIDE, Item, Scene
from .sprites import GLYPHS, SHAPES

KINDS = ("exists", "absent", "count", "colour", "shape", "relation", "quadrant", "glyph")
NUMBERS = ("one", "two", "three", "four")
QUADRANTS = ("northwest", "northeast", "southwest", "southeast")
ANSWERS = {
    "exists": ("yes", "no"),
    "absent": ("yes", "no"),
    "count": NUMBERS,
    "colour": COLOUR_NAMES,
    "shape": SHAPES,
    "relation": ("left", "right", "above", "below"),
    "quadrant": QUADRANTS,
    "glyph": tuple(GLYPHS),
}
PHRASES = {
    "exists": ("Is there {a} {pair}?", "Do you see {a} {pair}?", "Does the image show {a} {pair}?"),
    "count": ("How many objects are {v}?", "Count the {v} objects.", "What number of {v} objects?"),
    "count_shape": (
        "How many objects look like a {v}?",
        "Count the {v} shapes.",
        "What number of {v} shapes?",
    ),
    "colour": (
        "What colour is the {v}?",
        "Name the colour of the {v}.",
        "The {v} is which colour?",
    ),
    "shape": (
        "What shape is the {v} object?",
        "Name the shape of the {v} object.",
        "The {v} object is which shape?",
    ),
    "beside": (
        "Is the {one} left or right of the {two}?",
        "The {one} is left or right of the {two}?",
    ),
    "over": (
        "Is the {one} above or below the {two}?",
        "The {one} is above or below the {two}?",
    ),
    "quadrant": (
        "Which corner has the {pair}?",
        "In which quadrant is the {pair}?",
        "Where is the {pair}?",
    ),
    "glyph": (
        "What letter is on the {pair}?",
        "Which letter has the {pair}?",
        "Read the letter on the {pair}.",
    ),
}
_MIDLINE = 10  # pixels that a quadrant's object keeps from the midlines
_APART = 24  # pixels between two compared centres
_AXES = (("x", "beside", ("left", "right")), ("y", "over", ("above", "below")))


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: of question. text: plain user text. answer: one word.
        about: indices of the items that it is about.
        points: for each letter of the answer the items that show it; empty where the whole answer
            is seen on all items that the question is about.
    """

    kind: str
    text: str
    answer: str
    about: tuple[int, ...]
    points: tuple[tuple[int, ...], ...] = ()


def _phrase(rng: np.random.Generator, key: str, **words: str) -> str:
    forms = PHRASES[key]
    return forms[rng.integers(len(forms))].format(**words)


def _pick(rng: np.random.Generator, options: list):
    """One of the options, or None if there is none."""
    return options[rng.integers(len(options))] if options else None


def _name(item: Item) -> str:
    return f"{item.colour} {item.shape}"


def _asked(scene: Scene, need: Callable[[Item], bool] = lambda item: True) -> list[int]:
    return [i for i, item in enumerate(scene.items) if item.asked and need(item)]


def _by_pair(scene: Scene) -> list[int]:
    """Askable items whose colour and shape single them out."""
    return _asked(scene, lambda i: scene.unique(colour=i.colour, shape=i.shape) is not None)


def _presence(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    """A colour and shape pair, present or not with equal chance."""
    present = {item.pair for item in scene.items}
    colours, shapes = {p[0] for p in present}, {p[1] for p in present}
    missing = [
        (c, s)
        for c in COLOUR_NAMES
        for s in SHAPES
        if (c, s) not in present and ((c in colours and s in shapes) == (kind == "absent"))
    ]
    shown = _pick(rng, [scene.items[i].pair for i in _asked(scene)])
    hidden = _pick(rng, missing)
    if shown is None or hidden is None:  # either answer must be possible, or the text gives it away
        return None
    yes = rng.random() < 0.5
    pair = shown if yes else hidden
    article = "an" if pair[0] == "orange" else "a"
    text = _phrase(rng, "exists", a=article, pair=" ".join(pair))
    about = [i for i, item in enumerate(scene.items) if item.pair == pair or not yes]
    return Question(kind, text, "yes" if yes else "no", tuple(about))


def _count(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    group = scene.counted
    key = "count" if group.attribute == "colour" else "count_shape"
    text = _phrase(rng, key, v=group.value)
    about = [
        i for i, item in enumerate(scene.items) if getattr(item, group.attribute) == group.value
    ]
    return Question(kind, text, NUMBERS[group.count - 1], tuple(about))


def _attribute(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    """Ask for the colour of the only item of a shape, or the other way round."""
    key = "shape" if kind == "colour" else "colour"
    found = _pick(rng, _asked(scene, lambda i: scene.unique(**{key: getattr(i, key)}) is not None))
    if found is None:
        return None
    item = scene.items[found]
    return Question(kind, _phrase(rng, kind, v=getattr(item, key)), getattr(item, kind), (found,))


def _relation(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    options = []
    for i in _by_pair(scene):
        for j in _by_pair(scene):
            for axis, key, words in _AXES:
                gap = getattr(scene.items[i], axis) - getattr(scene.items[j], axis)
                if abs(gap) >= _APART:
                    options.append((i, j, key, words[int(gap > 0)]))
    found = _pick(rng, options)
    if found is None:
        return None
    i, j, key, answer = found
    text = _phrase(rng, key, one=_name(scene.items[i]), two=_name(scene.items[j]))
    return Question(kind, text, answer, (i, j))


def _quadrant(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    half = SIDE / 2
    found = _pick(
        rng,
        [
            i
            for i in _by_pair(scene)
            if min(abs(scene.items[i].x - half), abs(scene.items[i].y - half)) >= _MIDLINE
        ],
    )
    if found is None:
        return None
    item = scene.items[found]
    answer = QUADRANTS[2 * int(item.y > half) + int(item.x > half)]
    return Question(kind, _phrase(rng, kind, pair=_name(item)), answer, (found,))


def _glyph(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    found = _pick(rng, [i for i in _by_pair(scene) if scene.items[i].glyph])
    if found is None:
        return None
    item = scene.items[found]
    return Question(kind, _phrase(rng, kind, pair=_name(item)), item.glyph, (found,))


_ASK = {
    "exists": _presence,
    "absent": _presence,
    "count": _count,
    "colour": _attribute,
    "shape": _attribute,
    "relation": _relation,
    "quadrant": _quadrant,
    "glyph": _glyph,
}


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Ask one question of a kind.

    Args:
        scene: what to ask about.
        kind: one of `KINDS`.
        rng: source of all randomness.

    Returns:
        The question, or None if the scene allows none of this kind.
    """
    return _ASK[kind](scene, rng, kind)
