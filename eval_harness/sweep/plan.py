"""What a sweep asks: settings, tasks and how; from the command line or a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_harness.shelf import Shelved
from eval_harness.sweep.naming import unknown
from eval_harness.sweep.settings import Setting, settings_of
from eval_harness.sweep.tasks import TaskConfig
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.extras import require
from vlmcompress.hub.fetching import locate

POSITIONS = ("auto", "contiguous", "original")

#: What the options of a sweep set for all its tasks.
TASK_DEFAULTS = ("metric", "split", "limit", "prompt", "new_tokens")


@dataclass(frozen=True)
class SweepPlan:
    """A sweep.

    Attributes:
        model: a hub id, a folder or `reference`.
        tasks: what is asked.
        settings: in the order they are asked: the full model, `random` at every budget, the rest.
        dtype: of the model; `auto` takes the checkpoint's.
        positions: as `patch` takes it.
        batch: questions at a time.
        seed: of random methods and of intervals.
        clip: for methods that read the question, as `vlmcompress generate --clip` takes it.
        reuse_tower: run the vision tower once per picture instead of once per setting, where the
            model allows it; answers are the same but for rounding.
        adapter: whose settings are among them.
    """

    model: str
    tasks: tuple[TaskConfig, ...]
    settings: tuple[Setting, ...]
    dtype: str = "float32"
    positions: str = "auto"
    batch: int = 16
    seed: int = 0
    clip: str | None = None
    reuse_tower: bool = True
    adapter: Shelved | None = None

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ConfigError: without tasks, for tasks of one name, or values out of range.
        """
        if not self.tasks:
            raise ConfigError("A sweep needs tasks; name one, such as 'reference'.")
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions is {self.positions!r}; use {', '.join(POSITIONS)}.")
        if not isinstance(self.batch, int) or self.batch < 1:
            raise ConfigError(f"batch is {self.batch!r}; it must be 1 or more.")
        if self.adapter is not None and self.positions != self.adapter.found.positions:
            raise ConfigError(
                f"positions is {self.positions!r}, and {self.adapter.name} was trained with "
                f"{self.adapter.found.positions!r}; give these."
            )

    def identity(self) -> dict[str, Any]:
        """JSON-ready, what every answer depends on beside task and setting."""
        names = ("model", "dtype", "positions", "batch", "seed", "clip", "reuse_tower")
        adapter = self.adapter and {"name": self.adapter.name, **self.adapter.describe()}
        return {**{name: getattr(self, name) for name in names}, "adapter": adapter}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options of a sweep in a file.

    Raises:
        ConfigError: for a file that cannot be read or holds no mapping.
    """
    yaml = require("yaml")
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"{str(path)!r} holds no mapping of options to values.")
    return dict(found)


def plan_of(options: Mapping[str, Any]) -> SweepPlan:
    """A sweep from options as a YAML file names them (docs/evaluating.md).

    Raises:
        ConfigError: for unknown options (with near names), values that make no sense, and an
            adapter that is none.
        UnknownMethodError: for an unknown method.
    """
    options = dict(options)
    plain = {field.name for field in dataclasses.fields(SweepPlan)} - {"settings"}
    _refuse_unknown("option", options, {*plain, *TASK_DEFAULTS, "methods", "keeps", "seeds"})
    defaults = {name: options[name] for name in TASK_DEFAULTS if name in options}
    tasks = tuple(_task(task, defaults) for task in _list(options.get("tasks", ())))
    if options.get("adapter") is not None:
        options["adapter"] = Shelved.of(locate(options["adapter"]))
    chosen = settings_of(
        _list(options.get("methods", ())),
        _list(options.get("keeps", ())),
        seeds=options.get("seeds", 1),
        adapter=options.get("adapter"),
    )
    rest = {name: options[name] for name in plain - {"tasks"} if name in options}
    return SweepPlan(**{"model": "reference", **rest}, tasks=tasks, settings=chosen)


def _task(task: Any, defaults: Mapping[str, Any]) -> TaskConfig:
    given = {"task": task} if isinstance(task, str) else task
    if not isinstance(given, Mapping) or "task" not in given:
        raise ConfigError(f"A task is {task!r}; allowed are a name, a path, and a mapping.")
    _refuse_unknown("option of a task", given, [f.name for f in dataclasses.fields(TaskConfig)])
    return TaskConfig(**{**defaults, **given})


def _refuse_unknown(what: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in given:
        if name not in set(known):
            raise ConfigError(unknown(what, str(name), known))


def _list(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list | tuple) else [value]
