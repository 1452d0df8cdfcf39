"""Goes through the questions of a task, batch by batch and setting by setting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from eval_harness.sweep.asker import Answer, Asked, Asker, Batch, Unusable
from eval_harness.sweep.metrics import metric_of
from eval_harness.sweep.plan import SweepPlan
from eval_harness.sweep.processes import Processes
from eval_harness.sweep.questions import Question
from eval_harness.sweep.settings import Setting
from eval_harness.sweep.store import Answers
from eval_harness.sweep.tasks import Task
from vlmcompress.core.errors import UnsupportedInputError, VLMCompressError

_SEED_STEP = 1_000_003  # apart by more than there are batches


@dataclass(frozen=True)
class Cell:
    """One run of one setting.

    Attributes:
        setting: the method and what it keeps.
        run: which of its runs; each draws other numbers.
    """

    setting: Setting
    run: int

    @property
    def label(self) -> str:
        """Of its file."""
        return self.setting.label + (f".run{self.run}" if self.setting.runs > 1 else "")


def cells_of(plan: SweepPlan) -> list[Cell]:
    """Every run of every setting, in the order they are asked."""
    return [Cell(setting, run) for setting in plan.settings for run in range(setting.runs)]


@dataclass
class Worker:
    """Asks the batches of one process, and keeps the answers.

    Attributes:
        asker: asks the model.
        plan: what is asked.
        folder: of the answers.
        part: number of this process's files.
        team: who shares the batches: each takes every so many.
        progress: see `run.sweep`.
    """

    asker: Asker
    plan: SweepPlan
    folder: Path
    part: int
    team: Processes
    progress: Callable[[str, int | None, int], None] | None
    _started: float = field(default_factory=time.perf_counter)

    def ask(self, task: Task) -> None:
        """Ask a task under every setting."""
        with ExitStack() as stack:
            files = {}
            for cell in cells_of(self.plan):
                answers = Answers.of(self.folder, task.name, cell.label, self.part)
                files[cell] = stack.enter_context(closing(answers))
            done = {cell: answers.done() for cell, answers in files.items()}
            batches = enumerate(_batches(task.questions(), self.plan.batch))
            while True:
                with self.asker.spent.on("questions"):
                    number, batch = next(batches, (0, []))
                if not batch:
                    break
                if number % self.team.count == self.team.rank:
                    self._batch(task, number, batch, files, done)
                if self.progress:
                    self.progress(task.name, task.total, len(batch))

    def report(self) -> dict[str, float]:
        """Seconds by what they went to, with all of them as `all`."""
        return {**self.asker.spent.seconds, "all": time.perf_counter() - self._started}

    def _batch(
        self,
        task: Task,
        number: int,
        questions: Sequence[Question],
        files: dict[Cell, Answers],
        done: dict[Cell, bytearray],
    ) -> None:
        """Ask a batch under every setting that has not answered all of it."""
        first = number * self.plan.batch
        places = range(first, first + len(questions))
        open_cells = [c for c in files if not all(_there(done[c], i) for i in places)]
        if not open_cells:
            return
        ready, errors = self._prepared(task, questions, open_cells)
        for cell in open_cells:
            seed = self.plan.seed + number + cell.run * _SEED_STEP
            answers = self._answers(task, cell.setting, seed, ready, errors)
            rows = [
                _row(first + i, question, cell, seed, answers[i])
                for i, question in enumerate(questions)
            ]
            files[cell].append([row for row in rows if not _there(done[cell], row["index"])])

    def _prepared(
        self, task: Task, questions: Sequence[Question], cells: Sequence[Cell]
    ) -> tuple[tuple[list[int], Batch] | None, dict[int, str]]:
        """Places and batch of the questions that can be asked, and why the others cannot."""
        asked: dict[int, Asked] = {}
        errors: dict[int, str] = {}
        for place, question in enumerate(questions):
            try:
                asked[place] = self._opened(task, question)
            except UnsupportedInputError as error:
                errors[place] = str(error)
        settings = [cell.setting for cell in cells]
        while asked:
            places = [*asked]
            try:
                batch = self.asker.batch([*asked.values()], settings)
            except Unusable as error:
                for i, why in error.why.items():
                    errors[places[i]] = why
                    del asked[places[i]]
            else:
                return (places, batch), errors
        return None, errors

    def _opened(self, task: Task, question: Question) -> Asked:
        if question.error:
            raise UnsupportedInputError(question.error)
        with self.asker.spent.on("pictures"):
            images = tuple(picture.open() for picture in question.pictures)
        keys = tuple(picture.key for picture in question.pictures)
        return Asked(task.prompt(question), images, keys)

    def _answers(
        self,
        task: Task,
        setting: Setting,
        seed: int,
        ready: tuple[list[int], Batch] | None,
        errors: dict[int, str],
    ) -> dict[int, Answer | str]:
        """{place: the answer, or why there is none}."""
        found: dict[int, Answer | str] = dict(errors)
        if ready is None:
            return found
        places, batch = ready
        try:
            answers = self.asker.answers(batch, setting, task.config.new_tokens, seed)
        except VLMCompressError as error:
            return {**found, **dict.fromkeys(places, f"refused: {error}")}
        return {**found, **dict(zip(places, answers, strict=True))}


def _there(done: bytearray, index: int) -> bool:
    return index < len(done) and done[index] == 1


def _batches(questions: Iterator[Question], size: int) -> Iterator[list[Question]]:
    while batch := list(islice(questions, size)):
        yield batch


def _row(
    index: int, question: Question, cell: Cell, seed: int, answer: Answer | str
) -> dict[str, Any]:
    """One line of the samples; docs/evaluating.md explains it."""
    about = {
        "index": index,
        "id": question.id,
        "image_id": question.image_id,
        "kind": question.kind,
        "method": cell.setting.shown,
        "keep": cell.setting.keep,
        "seed": seed,
        "metric": question.metric,
        "answers": list(question.answers),
    }
    if isinstance(answer, str):
        return {**about, "prediction": None, "score": None, "error": answer}
    layers = {"visual_layers": list(answer.visual_layers)} if answer.visual_layers else {}
    return {
        **about,
        "prediction": answer.text,
        "score": metric_of(question.metric).score(answer.text, question),
        "tokens_in": answer.tokens_in,
        "tokens_out": answer.tokens_out,
        "visual_in": answer.visual_in,
        "visual_kept": answer.visual_kept,
        **layers,
        "error": None,
    }
