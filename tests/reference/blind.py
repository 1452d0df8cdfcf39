"""Questions as somebody sees them who does not see the pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def halves(draw: Callable[..., Any], ask: Callable[..., Any], kind: str, scenes: int) -> Any:
    """(text, answer) of the questions of a kind about many scenes: to learn from, to be asked."""
    rng = np.random.default_rng(3)
    asked = (ask(draw("train", i), kind, rng) for i in range(scenes))
    found = [(question.text, question.answer) for question in asked if question is not None]
    return found[: len(found) // 2], found[len(found) // 2 :]


def at_chance(right: float, chance: float, asked: int) -> bool:
    """Whether a share of right answers lies within four standard errors of chance."""
    return abs(right - chance) < 4 * np.sqrt(chance * (1 - chance) / asked)
