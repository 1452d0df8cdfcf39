"""What a results file says, for cards: the one source of every number in them.

A results file is a JSON object. Its key `evaluations` lists what was measured:

```json
{"command": "vlmcompress ...",
 "evaluations": [{"dataset": {"name": "POPE", "id": "lmms-lab/POPE", "split": "test",
                              "task": "default", "revision": "0123abc"},
                  "setting": "keep 0.1 + LoRA", "metric": "accuracy",
                  "value": 0.86, "low": 0.85, "high": 0.87, "questions": 9000,
                  "full_split": true, "compared": false}]}
```

Other keys are the business of whoever wrote it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from vlmcompress.core.errors import ConfigError

_TASK = "image-text-to-text"


@dataclass(frozen=True)
class Dataset:
    """What was asked.

    Attributes:
        name: for readers.
        id: of its repository on the Hub; None for others.
        config: of the dataset.
        split: of the dataset.
        revision: of its repository.
        task: under which the dataset's leaderboard on the Hub takes results.
    """

    name: str
    id: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        """Check that all are texts."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and (value is not None or field.name == "name"):
                raise ConfigError(f"A dataset's {field.name} is {value!r}; it must be a text.")


@dataclass(frozen=True)
class Evaluation:
    """One number.

    Attributes:
        dataset: what was asked.
        setting: what answered, for readers (`"keep 0.1 + LoRA"`).
        metric: its name, such as `accuracy`.
        value: as the metric gives it; accuracies as shares.
        low: lower end of its 95 % interval.
        high: upper end.
        questions: how many were asked.
        full_split: whether that was the whole official split.
        compared: whether it is of something else, shown beside (all tokens, no image).
    """

    dataset: Dataset
    setting: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    questions: int | None = None
    full_split: bool = False
    compared: bool = False

    def __post_init__(self) -> None:
        """Check values, and that a full split says of which dataset."""
        for name in ("setting", "metric"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(
                    f"An evaluation's {name} is {getattr(self, name)!r}; it must be a text."
                )
        for name in ("value", "low", "high"):
            _check_number(name, getattr(self, name), name != "value")
        if self.questions is not None and not _is_count(self.questions):
            raise ConfigError(f"An evaluation has {self.questions!r} questions; give a count.")
        for name in ("full_split", "compared"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"An evaluation's {name} is {getattr(self, name)!r}; say a bool.")
        if self.full_split and not (self.dataset.id and self.dataset.split and self.dataset.task):
            raise ConfigError(
                f"The evaluation {self.setting!r} claims the full split of {self.dataset.name!r} "
                "and does not say which; give its id, split and task, or full_split=false."
            )

    @property
    def official(self) -> bool:
        """Whether it may stand on the dataset's leaderboard."""
        return self.full_split and not self.compared

    @property
    def shown(self) -> str:
        """Value and interval for readers."""
        interval = "" if self.low is None else f" ({_digits(self.low)} to {_digits(self.high)})"
        return f"{_digits(self.value)}{interval}"

    def for_index(self) -> EvalResult:
        """As `model-index` has it."""
        data = self.dataset
        return EvalResult(
            task_type=_TASK,
            dataset_type=data.id or _slug(data.name),
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.split,
            dataset_revision=data.revision,
            metric_type=self.metric,
            metric_name=f"{self.metric}, {self.setting}",
            metric_value=self.value,
        )

    def for_leaderboard(self, date: str | None) -> EvalResultEntry:
        """As `.eval_results` has it; `official` ones only."""
        data = self.dataset
        return EvalResultEntry(
            dataset_id=str(data.id),
            task_id=str(data.task),
            value=self.value,
            dataset_revision=data.revision,
            date=date,
            notes=f"{self.setting}, {self.metric}",
        )

    @property
    def file_name(self) -> str:
        """Its own in `.eval_results`, since variants of one benchmark stand in separate files."""
        what = (self.dataset.id, self.dataset.task, self.setting, self.metric)
        return f"{_slug(' '.join(map(str, what)))}.yaml"

    def row(self) -> dict[str, Any]:
        """Flat, for tables and data sets."""
        data = {f"dataset_{k}": v for k, v in dataclasses.asdict(self.dataset).items()}
        own = {k: v for k, v in dataclasses.asdict(self).items() if k != "dataset"}
        return {**data, **own}


def evaluations(results: Mapping[str, Any]) -> list[Evaluation]:
    """What a results file says was measured; nothing where it has no `evaluations`.

    Raises:
        ConfigError: for entries that are no evaluations.
    """
    listed = results.get("evaluations", [])
    if not isinstance(listed, list):
        raise ConfigError(f"evaluations is {listed!r}; it must be a list.")
    return [_evaluation(entry) for entry in listed]


def date_of(results: Mapping[str, Any]) -> str | None:
    """When it was measured, where the file says so."""
    machine = results.get("machine")
    date = machine.get("date") if isinstance(machine, Mapping) else None
    return date if isinstance(date, str) else None


def _evaluation(entry: object) -> Evaluation:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("dataset"), Mapping):
        raise ConfigError(f"An evaluation is {entry!r}; it must be an object with a dataset.")
    own = {k: v for k, v in entry.items() if k != "dataset"}
    try:
        return Evaluation(dataset=Dataset(**entry["dataset"]), **own)
    except TypeError as error:
        names = ", ".join(f.name for f in dataclasses.fields(Evaluation))
        raise ConfigError(
            f"An evaluation has missing or unknown keys ({error}); allowed are {names}."
        ) from error


def _check_number(name: str, value: object, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"An evaluation's {name} is {value!r}; it must be a finite number.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _digits(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _slug(text: str) -> str:
    words = "".join(c.lower() if c.isalnum() or c == "." else " " for c in text).split()
    return "-".join(words)
