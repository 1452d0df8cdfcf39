"""Estimates from answers to the same questions: accuracies, and differences by question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval_harness import statistics


@dataclass(frozen=True)
class World:
    """The answers of one world.

    Attributes:
        name: of the world.
        bare: without a method: `full` and `blind`, strings of 0 and 1, `kinds` and `scenes` per
            question.
        answers: {method: `right` {mode: {keep: [such a string per run]}}, `refused` {mode: {keep:
            why}}}.
        positions: modes.
        keeps: budgets.
        against: the method that all are compared with.
        seed: of the bootstrap.
    """

    name: str
    bare: dict[str, Any]
    answers: dict[str, dict[str, Any]]
    positions: tuple[str, ...]
    keeps: tuple[float, ...]
    against: str = "random"
    seed: int = 0

    def summary(self) -> dict[str, Any]:
        """Estimates of everything."""
        full, blind = right_of([self.bare["full"]]), right_of([self.bare["blind"]])
        sizes = {"questions": len(full), "images": len(set(self.bare["scenes"]))}
        values = {
            "full": full,
            "blind": blind,
            "accuracy": self._table(lambda row, _: row),
            "over_random": self._table(lambda row, random: row - random),
            "over_full": self._table(lambda row, _: row - full),
        }
        return {**sizes, **estimated(self.bare, values, self.seed)}

    def refused(self) -> list[dict[str, Any]]:
        """What the library refuses, and why."""
        return [
            {"world": self.name, "method": method, "positions": mode, "keep": keep, "why": why}
            for method, row in self.answers.items()
            for mode, keeps in row["refused"].items()
            for keep, why in keeps.items()
        ]

    def _table(self, value: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> dict[str, Any]:
        """{mode: {keep: {method: [questions]}}} from a method's answers and random's."""
        return {
            mode: {
                str(keep): {
                    method: value(row, random)
                    for method in self.answers
                    for row in self._rows(method, mode, keep)
                    for random in self._rows(self.against, mode, keep)
                }
                for keep in self.keeps
            }
            for mode in self.positions
        }

    def _rows(self, method: str, mode: str, keep: float) -> list[np.ndarray]:
        """Shares of runs that answered each question rightly; nothing where it was refused."""
        kept = self.answers[method]["right"].get(mode, {}).get(str(keep))
        if kept is None and not self.answers[method]["refused"].get(mode, {}).get(str(keep)):
            return [right_of([self.bare["full"]])]  # all is kept, so nothing was run
        return [] if kept is None else [right_of(kept)]


def estimated(bare: Mapping[str, Any], values: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """[mean, low, high] in place of every array of a nested dict.

    Args:
        bare: `kinds` and `scenes` per question.
        values: nested; [questions] each.
        seed: of the bootstrap.
    """
    kinds, scenes = np.array(bare["kinds"]), np.array(bare["scenes"])
    found = statistics.means_over_kinds([*_leaves(values)], kinds, scenes, seed=seed)
    estimates = iter([round(x, 4) for x in (e.mean, e.low, e.high)] for e in found)

    def filled(value: Any) -> Any:
        nested = isinstance(value, dict)
        return {k: filled(v) for k, v in value.items()} if nested else next(estimates)

    return {name: filled(value) for name, value in values.items()}


def _leaves(value: Any) -> Iterator[np.ndarray]:
    """The arrays of a nested dict, in its order."""
    if not isinstance(value, dict):
        yield value
        return
    for inner in value.values():
        yield from _leaves(inner)


def right_of(runs: Iterable[str]) -> np.ndarray:
    """[questions] share of runs that answered rightly."""
    return np.array([[bit == "1" for bit in run] for run in runs], dtype=float).mean(axis=0)
