"""Questions that the full model answers and a compressed one does not, the worst first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eval_harness.asking import BLIND, FULL
from eval_harness.report.inputs import Run, label

#: Settings that are expected to lose answers, and teach nothing where they do.
CONTROLS = (FULL, BLIND, "random")


@dataclass(frozen=True)
class Fall:
    """A setting that loses on a question.

    Attributes:
        method: of the setting.
        keep: what it keeps; None where the method says it itself.
        row: its line in the samples.
    """

    method: str
    keep: Any
    row: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Of the setting."""
        return label(self.method, self.keep)


@dataclass(frozen=True)
class Regression:
    """A question under the settings that lose on it.

    Attributes:
        task: its name.
        index: of the question in its task.
        full: the line of the model without compression.
        falls: the settings that score lower, by how much, the worst first.
        lost: sum of what they score lower.
    """

    task: str
    index: int
    full: Mapping[str, Any]
    falls: tuple[Fall, ...]
    lost: float


def worst(run: Run, count: int) -> list[Regression]:
    """The questions on which compression loses most, summed over settings.

    Files are read twice and never held: what is kept of each question is a number.

    Args:
        run: a sweep with its answers.
        count: how many questions at most.
    """
    found = []
    for task in run.results["tasks"]:
        full = {row["index"]: row["score"] for row in _answered(run, task, _full_row(run, task))}
        lost: dict[int, float] = {}
        for setting in _settings(run, task):
            for row in _answered(run, task, setting):
                if row["score"] < full.get(row["index"], 0.0):
                    more = full[row["index"]] - row["score"]
                    lost[row["index"]] = lost.get(row["index"], 0.0) + more
        found += [(loss, task, index) for index, loss in lost.items()]
    chosen = sorted(found, key=lambda one: (-one[0], one[1], one[2]))[:count]
    return list(_collected(run, chosen))


def _collected(run: Run, chosen: list[tuple[float, str, int]]) -> Iterator[Regression]:
    """The lines of the chosen questions."""
    full: dict[tuple[str, int], Mapping[str, Any]] = {}
    falls: dict[tuple[str, int], list[Fall]] = {(task, index): [] for _, task, index in chosen}
    for task in dict.fromkeys(task for _, task, _ in chosen):
        for row in _answered(run, task, _full_row(run, task)):
            full[task, row["index"]] = row
        for setting in _settings(run, task):
            for row in _answered(run, task, setting):
                place = task, row["index"]
                if place in falls and row["score"] < full[place]["score"]:
                    falls[place].append(Fall(setting["method"], setting["keep"], row))
    for loss, task, index in chosen:
        ordered = sorted(falls[task, index], key=lambda fall: (fall.row["score"], fall.label))
        yield Regression(task, index, full[task, index], tuple(ordered), loss)


def _full_row(run: Run, task: str) -> dict[str, Any]:
    return {"method": FULL, "keep": None, "runs": 1}


def _settings(run: Run, task: str) -> list[dict[str, Any]]:
    return [row for row in run.rows(task) if row["method"] not in CONTROLS]


def _answered(run: Run, task: str, setting: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Lines with a score; of a setting that was asked several times those of the first run."""
    from eval_harness.sweep.store import Answers

    name = label(setting["method"], setting["keep"]) + (".run0" if setting["runs"] > 1 else "")
    for row in Answers.of(run.folder, task, name, 0).rows():
        if row["score"] is not None:
            yield row
