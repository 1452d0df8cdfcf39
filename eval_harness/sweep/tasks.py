"""Sets of questions: scenes that the library draws, and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from eval_harness.sweep.files import QUESTIONS, SUFFIXES, fingerprint, open_parquet, task_files
from eval_harness.sweep.metrics import metric_of
from eval_harness.sweep.naming import unknown
from eval_harness.sweep.questions import Picture, Question
from eval_harness.sweep.rows import question_of
from vlmcompress.core.errors import ConfigError

DRAWN = {"reference": "objects", "reference_text": "text"}
"""Tasks without files: names, and the world that each is drawn from."""

_DRAWN_QUESTIONS = 800
_DRAWN_SPLIT = "test"
_ROWS = 16  # of a Parquet file at once: pictures may be large


@dataclass(frozen=True)
class TaskConfig:
    """A task as it is asked for.

    Attributes:
        task: a name of `DRAWN`, a file, or a folder with `questions.jsonl` or Parquet files.
        name: in results; that of the file or folder where not given.
        metric: of rows that name none.
        split: only rows of this `split`; of drawn scenes `test` where not given.
        limit: the first questions only.
        prompt: what is asked, with `{question}` and `{options}`; the metric's where not given.
        new_tokens: longest answer.
    """

    task: str
    name: str = ""
    metric: str = "exact_match"
    split: str | None = None
    limit: int | None = None
    prompt: str | None = None
    new_tokens: int = 16

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ConfigError: for an unknown metric, a prompt without the question, or counts below 1.
        """
        metric_of(self.metric)
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ConfigError(f"prompt is {self.prompt!r}; it must hold {{question}}.")
        for name in ("limit", "new_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(
                    f"{name} of task {self.task!r} is {value!r}; it must be 1 or more."
                )


@dataclass(frozen=True)
class Task:
    """Questions that are read one after the other, as often as they are wanted.

    Attributes:
        config: as asked for.
        name: unique within a sweep.
        identity: JSON-ready, whatever the questions depend on.
        read: gives all questions.
        total: how many there are; None where that is not known beforehand.
    """

    config: TaskConfig
    name: str
    identity: dict[str, Any]
    read: Callable[[], Iterator[Question]]
    total: int | None = None

    def questions(self) -> Iterator[Question]:
        """The questions up to the limit."""
        return islice(self.read(), self.config.limit)

    def prompt(self, question: Question) -> str:
        """The text that the model is asked."""
        return question.prompt(self.config.prompt or metric_of(question.metric).prompt)


def open_task(config: TaskConfig) -> Task:
    """A task, ready to be read.

    Raises:
        ConfigError: for an unknown task (with near names), a folder without questions, a split
            without rows, or a first row that cannot be asked.
    """
    found = _drawn(config) if config.task in DRAWN else _filed(config)
    first = next(found.questions(), None)
    if first is None:
        of_split = f" of split {config.split!r}" if config.split else ""
        raise ConfigError(f"Task {config.task!r} has no rows{of_split}.")
    if first.error:
        raise ConfigError(f"Task {config.task!r} cannot be asked: {first.error}.")
    metric_of(first.metric).score("", first)  # a missing package is told before anything is run
    return found


def _drawn(config: TaskConfig) -> Task:
    world, split = DRAWN[config.task], config.split or _DRAWN_SPLIT
    limit = config.limit or _DRAWN_QUESTIONS

    def read() -> Iterator[Question]:
        from vlmcompress.reference.data import samples

        for number, sample in enumerate(samples(split, limit, world=world)):
            scene = str(sample.scene_id)
            yield Question(
                id=str(number),
                pictures=(Picture(sample.image, scene),),
                question=sample.question,
                answers=(sample.answer,),
                metric=config.metric,
                image_id=scene,
                kind=sample.kind,
            )

    identity = {"world": world, **_asked(config), "split": split, "limit": limit}
    return Task(config, config.name or config.task, identity, read, limit)


def _filed(config: TaskConfig) -> Task:
    files = task_files(Path(config.task))
    if not files:
        raise ConfigError(_no_task(config.task))
    rows = sum(_rows_in(file) for file in files) if config.split is None else None
    limits = [n for n in (rows, config.limit) if n is not None]

    def read() -> Iterator[Question]:
        number = 0
        for file in files:
            for row in _rows_of(file):
                if config.split in (None, row.get("split")) or _BAD in row:
                    yield _question(row, number, file.parent, config.metric)
                number += 1

    path = Path(config.task)
    return Task(
        config,
        config.name or path.stem,
        {"files": {file.name: fingerprint(file) for file in files}, **_asked(config)},
        read,
        min(limits) if rows is not None else config.limit,
    )


_BAD = "\0error"  # the field of a row that cannot be read at all


def _question(row: Mapping[str, Any], number: int, folder: Path, metric: str) -> Question:
    if _BAD in row:
        return Question(str(number), image_id=str(number), error=str(row[_BAD]))
    return question_of(row, number, folder, metric)


def _asked(config: TaskConfig) -> dict[str, Any]:
    names = ("metric", "split", "limit", "prompt", "new_tokens")
    return {name: getattr(config, name) for name in names}


def _no_task(name: str) -> str:
    path = Path(name)
    if path.is_dir():
        return f"Folder {name!r} holds neither {QUESTIONS} nor Parquet files."
    if path.is_file():
        return f"File {name!r} is no task; allowed are {' and '.join(SUFFIXES)}."
    beside: list[Path] = [*path.parent.iterdir()] if path.parent.is_dir() else []
    near = [str(other) for other in beside if task_files(other)]
    known = "a file, a folder, or one of these names"
    return f"{unknown('task', name, [*DRAWN, *near])} A task is {known}."


def _rows_of(file: Path) -> Iterator[Mapping[str, Any]]:
    return _parquet_rows(file) if file.suffix == ".parquet" else _lines(file)


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                row = {_BAD: f"{file.name}, line {number}, is no JSON: {error}"}
            yield row if isinstance(row, dict) else {_BAD: f"{file.name}, line {number}: no object"}


def _parquet_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    with open_parquet(file) as table:
        for batch in table.iter_batches(batch_size=_ROWS):
            yield from batch.to_pylist()


def _rows_in(file: Path) -> int:
    if file.suffix == ".parquet":
        with open_parquet(file) as table:
            return int(table.metadata.num_rows)
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
