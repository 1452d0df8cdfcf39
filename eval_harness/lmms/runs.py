"""lmms-eval with the model `vlmcompress`, as a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmcompress.core.errors import ConfigError, MissingExtraError, ResultsError
from vlmcompress.integrations.lmms_eval import MODEL, TASKS

_LAST_LINES = 15


@dataclass(frozen=True)
class Run:
    """One start of lmms-eval.

    Attributes:
        model_args: as the model takes them; what is None is left out.
        tasks: names.
        out: folder of what it writes, emptied first.
        include: folder of tasks beside lmms-eval's own.
        batch: questions at a time.
        device: cpu, cuda, ...; the model's choice where None.
        limit: first questions of each task.
        online: whether it may download models and data.
    """

    model_args: Mapping[str, Any]
    tasks: Sequence[str]
    out: Path
    include: Path = TASKS
    batch: int = 1
    device: str | None = None
    limit: int | None = None
    online: bool = False

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ConfigError: for one that lmms-eval would read as two.
        """
        for name, value in self.model_args.items():
            if "," in str(value):
                raise ConfigError(f"{name} is {value!r}; lmms-eval splits arguments at commas.")

    def command(self) -> list[str]:
        """The words of the command, Python first."""
        given = [f"{name}={v}" for name, v in self.model_args.items() if v is not None]
        words = ["--model", MODEL, "--model_args", ",".join(given)]
        words += ["--tasks", ",".join(self.tasks), "--include_path", str(self.include)]
        words += ["--batch_size", str(self.batch), "--log_samples", "--output_path", str(self.out)]
        words += [] if self.device is None else ["--device", self.device]
        words += [] if self.limit is None else ["--limit", str(self.limit)]
        return ["python", "-m", "lmms_eval", *words]

    def __str__(self) -> str:
        """The command as one types it."""
        return shlex.join(self.command())


@dataclass(frozen=True)
class Outcome:
    """What lmms-eval wrote.

    Attributes:
        results: its results file.
        samples: of each task, in order of the questions.
    """

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]

    def scores(self, task: str) -> dict[str, float]:
        """{metric: value} of a task, without lmms-eval's names of filters."""
        found = self.results["results"][task].items()
        return {k.partition(",")[0]: v for k, v in found if isinstance(v, float | int)}

    def metric(self, task: str, name: str) -> float:
        """One metric of a task.

        Raises:
            ResultsError: where lmms-eval gives none of this name.
        """
        found = self.scores(task)
        if name not in found:
            raise ResultsError(f"lmms-eval gives no {name!r} for {task!r}, only {sorted(found)}.")
        return found[name]


def installed() -> bool:
    """Whether lmms-eval can be started here."""
    return find_spec("lmms_eval") is not None


def go(run: Run) -> Outcome:
    """Start lmms-eval and wait for it.

    Raises:
        MissingExtraError: where it is not installed.
        ResultsError: when it ends without results; its last lines are told.
    """
    if not installed():
        raise MissingExtraError("lmms-eval", "lmms")
    shutil.rmtree(run.out, ignore_errors=True)
    offline = {} if run.online else {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *run.command()[1:]],
        env={**os.environ, **offline},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    # It ends with 0 when an evaluation fails, too.
    found = sorted(run.out.rglob("*_results.json"))
    if done.returncode or not found:
        last = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise ResultsError(f"lmms-eval wrote no results. The command was\n{run}\nIt said\n{last}")
    return Outcome(
        json.loads(found[-1].read_text(encoding="utf-8")),
        {task: _samples(run.out, task) for task in run.tasks},
    )


def _samples(folder: Path, task: str) -> list[dict[str, Any]]:
    rows = [
        json.loads(line)
        for file in folder.rglob(f"*_samples_{task}.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(rows, key=lambda row: int(row["doc_id"]))
