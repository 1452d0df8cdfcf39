"""What a sweep asks: settings, tasks and how; from the command line or a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from eval_harness.asking import BLIND, FULL, Entry
from eval_harness.comparison import source
from eval_harness.sweep.naming import unknown
from eval_harness.sweep.tasks import TaskConfig
from vlmcompress.core.config import StageConfig
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.extras import require
from vlmcompress.core.keep import parse_keep
from vlmcompress.methods import pipeline

RANDOM = "random"
POSITIONS = ("auto", "contiguous", "original")

#: What the options of a sweep set for all its tasks.
TASK_DEFAULTS = ("metric", "split", "limit", "prompt", "new_tokens")


@dataclass(frozen=True)
class Setting:
    """A method with what it keeps: one row of the table.

    Attributes:
        method: a name or a spec string; `full` is the model without a method, `blind` the model
            without a picture.
        keep: a fraction, a count or `auto`; None where the method says it itself.
        against: what `random` keeps that this is compared with; None where no share can be told.
        runs: how often it is asked, each time with another seed.
    """

    method: str
    keep: float | int | str | None = None
    against: float | int | str | None = None
    runs: int = 1

    @property
    def label(self) -> str:
        """`divprune:0.1`."""
        return self.method if self.keep is None else f"{self.method}:{self.keep}"

    @property
    def compresses(self) -> bool:
        """Whether there is a method at all."""
        return self.method not in (FULL, BLIND)


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

    def identity(self) -> dict[str, Any]:
        """JSON-ready, what every answer depends on beside task and setting."""
        names = ("model", "dtype", "positions", "batch", "seed", "clip", "reuse_tower")
        return {name: getattr(self, name) for name in names}


def identity_of(setting: Setting) -> str:
    """Hash of the files that define a setting's methods; empty without one."""
    return source(setting.method) if setting.compresses else ""


def settings_of(
    methods: Sequence[Any], keeps: Sequence[float | int | str], *, seeds: int = 1
) -> tuple[Setting, ...]:
    """Every setting of a sweep, controls first.

    Args:
        methods: names and spec strings, or mappings with `method` and `keeps`; `blind` asks
            without a picture. Specs that say how much stays are asked once, others at each keep.
        keeps: of methods that name none.
        seeds: runs of methods that draw numbers.

    Raises:
        ConfigError: for a setting given twice, a method without a budget, or `seeds` below 1.
        UnknownMethodError: for an unknown method.
    """
    if not isinstance(seeds, int) or seeds < 1:
        raise ConfigError(f"seeds is {seeds!r}; it must be 1 or more.")
    asked = [one for method in methods for one in _expanded(method, keeps, seeds)]
    labels = [setting.label for setting in asked]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ConfigError(f"Asked twice: {', '.join(sorted(twice))}; name every setting once.")
    randoms = {s.keep: s for s in asked if s.method == RANDOM}
    for keep in [s.against for s in asked if s.against is not None]:
        randoms.setdefault(keep, Setting(RANDOM, keep, runs=seeds))
    rest = [s for s in asked if s.method not in (FULL, RANDOM)]
    return (Setting(FULL), *(dataclasses.replace(s, against=None) for s in randoms.values()), *rest)


def _expanded(method: Any, keeps: Sequence[Any], seeds: int) -> list[Setting]:
    name, own = _named(method)
    if name in (FULL, BLIND):
        return [Setting(name)]
    entry = Entry.of(name)
    runs = seeds if entry.stochastic else 1
    try:
        stages = pipeline.build(name).config.stages
    except ConfigError:
        pipeline.build(name, keep=1)  # what is wrong with it apart from the budget
        budgets = [*(keeps if own is None else own)]
        if not budgets:
            raise ConfigError(
                f"Method {name!r} does not say how much it keeps; give keeps, or write {name}:0.1."
            ) from None
        for keep in budgets:
            pipeline.build(name, parse_keep(keep))
        return [Setting(name, keep, _reached(name, keep), runs) for keep in budgets]
    if own is not None:
        raise ConfigError(f"Method {name!r} says how much it keeps, and so do its keeps {own}.")
    return [Setting(name, None, _share(stages), runs)]


def _named(method: Any) -> tuple[str, Sequence[Any] | None]:
    if isinstance(method, str):
        return method, None
    if isinstance(method, Mapping) and set(method) <= {"method", "keeps"} and "method" in method:
        keeps = method.get("keeps")
        return str(method["method"]), [keeps] if isinstance(keeps, float | int | str) else keeps
    raise ConfigError(
        f"A method is {method!r}; allowed are a name, a spec string, and a mapping with 'method' "
        "and 'keeps'."
    )


def _reached(name: str, keep: float | int | str) -> float | int | str | None:
    if keep == "auto":  # how many that is differs by image
        return None
    return _share(pipeline.build(name, keep).config.stages)


def _share(stages: Iterable[StageConfig]) -> float | int | None:
    """What is left of an image behind all stages: a share or a count; None if content decides."""
    kept = [stage.keep for stage in stages]
    told = [keep for keep in kept if isinstance(keep, float | int)]
    return reduce(_then, told) if len(told) == len(kept) else None


def _then(before: float | int, keep: float | int) -> float | int:
    if isinstance(keep, int):
        return keep
    return max(1, round(before * keep)) if isinstance(before, int) else before * keep


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
        ConfigError: for unknown options (with near names) and values that make no sense.
        UnknownMethodError: for an unknown method.
    """
    plain = {field.name for field in dataclasses.fields(SweepPlan)} - {"settings"}
    _refuse_unknown("option", options, {*plain, *TASK_DEFAULTS, "methods", "keeps", "seeds"})
    defaults = {name: options[name] for name in TASK_DEFAULTS if name in options}
    tasks = tuple(_task(task, defaults) for task in _list(options.get("tasks", ())))
    chosen = settings_of(
        _list(options.get("methods", ())),
        _list(options.get("keeps", ())),
        seeds=options.get("seeds", 1),
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
