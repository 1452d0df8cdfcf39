"""Three kinds of questions about signs and tables; their answers are spelled letter by letter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .questions import Question
from .text_scenes import Strip, TextScene

TEXT_KINDS = ("sign", "cell", "largest")
TEXT_PHRASES = {
    "sign": ("What does the {v} sign say?", "Read the {v} sign.", "What is on the {v} sign?"),
    "cell": ("What number is in the {v} row?", "Which number has the {v} row?"),
    "named_cell": ("What number is in row {v}?", "Which number has row {v}?"),
    "largest": ("Which row has the largest number?", "The largest number is in which row?"),
    "smallest": ("Which row has the smallest number?", "The smallest number is in which row?"),
}


def _phrase(rng: np.random.Generator, key: str, **words: str) -> str:
    forms = TEXT_PHRASES[key]
    return forms[rng.integers(len(forms))].format(**words)


def _number(row: Strip) -> str:
    return row.text[1]


def _sign(scene: TextScene, rng: np.random.Generator) -> Question:
    sign = scene.signs[rng.integers(len(scene.signs))]
    letters = tuple((i,) for i in sign.members)
    text = _phrase(rng, "sign", v=sign.colour)
    return Question("sign", text, sign.text, sign.members, letters)


def _cell(scene: TextScene, rng: np.random.Generator) -> Question:
    row = scene.rows[rng.integers(len(scene.rows))]
    _name, number = row.members
    if rng.random() < 0.5:
        text = _phrase(rng, "cell", v=row.colour)
    else:
        text = _phrase(rng, "named_cell", v=row.text[0])
    return Question("cell", text, _number(row), row.members, ((number,),))


def _largest(scene: TextScene, rng: np.random.Generator) -> Question:
    key, best = (("largest", max), ("smallest", min))[rng.integers(2)]
    row = best(scene.rows, key=_number)
    table = tuple(i for strip in scene.rows for i in strip.members)
    return Question("largest", _phrase(rng, key), row.text[0], table, (row.members,))


_ASK: dict[str, Callable[[TextScene, np.random.Generator], Question]] = {
    "sign": _sign,
    "cell": _cell,
    "largest": _largest,
}


def ask_text(scene: TextScene, kind: str, rng: np.random.Generator) -> Question | None:
    """Ask one question of a kind.

    Args:
        scene: what to ask about.
        kind: one of `TEXT_KINDS`.
        rng: source of all randomness.

    Returns:
        The question, or None if the scene has no sign (no table) to ask about.
    """
    there = scene.signs if kind == "sign" else scene.rows
    return _ASK[kind](scene, rng) if there else None
