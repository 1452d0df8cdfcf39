"""Files of published values: one YAML per model, in which every value has its source."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval_harness.sweep.naming import unknown
from eval_harness.sweep.plan import read_yaml
from vlmcompress.core.errors import ConfigError

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """What papers call by one name.

    Attributes:
        title: in tables.
        task: of lmms-eval; empty where it runs none.
        metric: names in its results, which are added.
        scale: from lmms-eval's unit to the papers'.
        dataset: on the Hub.
        note: how ours differs.
    """

    title: str
    task: str = ""
    metric: tuple[str, ...] = ()
    scale: float = 1.0
    dataset: str = ""
    note: str = ""


@dataclass(frozen=True)
class Method:
    """A method as papers call it.

    Attributes:
        ours: its name here; empty where it is not run, and `note` says why.
        clip: a CLIP model that it needs to read the question.
        note: what to know.
    """

    ours: str = ""
    clip: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Values of one method at one budget on which sources agree.

    Attributes:
        method: as papers call it.
        tokens: per image; means over layers for methods inside the language model.
        sources: keys of them.
        values: {benchmark: as printed}.
    """

    method: str
    tokens: int
    sources: tuple[str, ...]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Published:
    """All that is known for one model.

    Attributes:
        name: of the file.
        model: hub id.
        tokens: visual tokens without compression.
        benchmarks: by key.
        sources: {key: what, where, read}.
        methods: by the papers' names; `full` is the model without one.
        rows: the values.
    """

    name: str
    model: str
    tokens: int
    benchmarks: Mapping[str, Benchmark]
    sources: Mapping[str, Mapping[str, str]]
    methods: Mapping[str, Method]
    rows: Sequence[Row] = field(default=())

    def chosen(
        self, methods: Collection[str] = (), tokens: Collection[int] = ()
    ) -> tuple[Row, ...]:
        """Rows of some methods (by the papers' names or ours) and budgets; all where empty.

        Those of the full model are always among them.

        Raises:
            ConfigError: for methods and budgets of which there is no value.
        """
        known = {name: method.ours for name, method in self.methods.items()}
        for name in methods:
            if name not in {*known, *known.values()}:
                raise ConfigError(unknown("method", name, known))
        budgets = {row.tokens for row in self.rows}
        for count in tokens:
            if count not in budgets:
                told = ", ".join(map(str, sorted(budgets, reverse=True)))
                raise ConfigError(f"No value for {count} tokens is published; there are: {told}.")
        return tuple(
            row
            for row in self.rows
            if row.method == "full"
            or (
                (not methods or {row.method, known[row.method]} & {*methods})
                and (not tokens or row.tokens in tokens)
            )
        )


def names() -> list[str]:
    """Models of which values are kept."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def published(name: str) -> Published:
    """The values for a model.

    Raises:
        ConfigError: for an unknown one, with near names.
    """
    if name not in names():
        raise ConfigError(unknown("set of published values", name, names()))
    return parse(name, read_yaml(FOLDER / f"{name}.yaml"))


def parse(name: str, data: Mapping[str, Any]) -> Published:
    """Values from the content of a file.

    Raises:
        ConfigError: where a value has no source, or something is named that is not described.
    """
    made = Published(
        name=name,
        model=data["model"],
        tokens=data["tokens"],
        benchmarks={key: _benchmark(told) for key, told in data["benchmarks"].items()},
        sources=data["sources"],
        methods={key: Method(**told) for key, told in data["methods"].items()},
        rows=tuple(
            Row(row["method"], row["tokens"], tuple(row.get("sources", ())), row["values"])
            for row in data["rows"]
        ),
    )
    for row in made.rows:
        what = f"The row of {row.method!r} at {row.tokens} tokens in {name!r}"
        if not row.sources:
            raise ConfigError(f"{what} has no source.")
        _refuse_unknown(f"{what} names the source", row.sources, made.sources)
        _refuse_unknown(f"{what} names the benchmark", row.values, made.benchmarks)
        _refuse_unknown(f"{what} names the method", [row.method], made.methods)
    return made


def _benchmark(told: Mapping[str, Any]) -> Benchmark:
    metric = told.get("metric", ())
    return Benchmark(**{**told, "metric": (metric,) if isinstance(metric, str) else tuple(metric)})


def _refuse_unknown(what: str, found: Collection[str], known: Collection[str]) -> None:
    for one in found:
        if one not in known:
            raise ConfigError(f"{what} {one!r}, which it does not describe.")
