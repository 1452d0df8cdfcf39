"""Reads what `vlmcompress eval run` and `vlmcompress bench` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_harness.asking import FULL
from eval_harness.sweep.tables import mean_kept
from vlmcompress.core.errors import ConfigError

RUN, RESULTS = "run.json", "results.json"


@dataclass(frozen=True)
class Run:
    """A folder of `vlmcompress eval run`.

    Attributes:
        folder: with the answers.
        asked: its `run.json`: what all answers depend on, and every task.
        results: its `results.json`.
    """

    folder: Path
    asked: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def model(self) -> str:
        """As it was named."""
        return str(self.asked["common"]["model"])

    def rows(self, task: str) -> list[dict[str, Any]]:
        """One per setting that answered anything; `FULL` first."""
        rows = [row for row in self.results["tasks"][task]["rows"] if row["score"]]
        return sorted(rows, key=lambda row: row["method"] != FULL)


@dataclass(frozen=True)
class Bench:
    """A file of `vlmcompress bench` (of a model, not of a tower alone)."""

    file: Path
    results: Mapping[str, Any]

    @property
    def subject(self) -> str:
        """The model or shape, and its type."""
        machine = self.results["machine"]
        return f"{machine['shape']} in {machine['dtype']}"

    def ttft(self, method: str, keep: Any) -> float | None:
        """Time to the first token over the unpatched model's in the same rounds.

        From the picture where the processor was timed too. None for what was not measured.

        Args:
            method: `FULL` for the unpatched model.
            keep: None for methods that say it themselves.
        """
        if method == FULL:
            return 1.0
        for row in self.results["configs"]:
            if row["method"] == method and (keep is None or str(row["keep"]) == str(keep)):
                return 1 / float(row.get("speedup_from_image") or row["speedup"])
        return None


@dataclass(frozen=True)
class Findings:
    """All that a page tells of."""

    runs: tuple[Run, ...]
    benches: tuple[Bench, ...]


def read(paths: Sequence[str | Path]) -> Findings:
    """Read results, told apart by what is in them.

    Args:
        paths: folders of `vlmcompress eval run`, JSON files of `vlmcompress bench`.

    Raises:
        ConfigError: for a path that is neither, or a damaged file.
    """
    found = [_one(Path(path)) for path in paths]
    if not found:
        raise ConfigError("A report needs results: folders of `eval run`, files of `bench`.")
    return Findings(
        tuple(one for one in found if isinstance(one, Run)),
        tuple(one for one in found if isinstance(one, Bench)),
    )


def _one(path: Path) -> Run | Bench:
    if path.is_dir():
        run = Run(path, _json(path / RUN), _json(path / RESULTS))
        if "common" in run.asked and "tasks" in run.results:
            return run
    else:
        results = _json(path)
        if {"configs", "machine", "protocol"} <= set(results):
            return Bench(path, results)
    raise ConfigError(
        f"{str(path)!r} holds no results of a known kind; allowed are folders of `vlmcompress eval "
        "run` and JSON files that `vlmcompress bench --out` wrote (without --tower)."
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}.") from error
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{str(path)!r} holds a {type(found).__name__}, not results.")
    return found


def label(method: str, keep: Any) -> str:
    """`divprune:0.1`, as a reader names a setting."""
    return method if keep is None else f"{method}:{keep}"


def share_kept(row: Mapping[str, Any]) -> float:
    """Share of the visual tokens that were kept, as a mean over the language model's layers."""
    given = row["tokens"].get("visual_in")
    return (mean_kept(row) or 0.0) / given if given else 0.0


def layer_lines(findings: Findings) -> Iterator[tuple[str, list[float]]]:
    """(what, visual tokens in each layer of the language model) of every configuration."""
    for bench in findings.benches:
        base = bench.results["configs"][0]["baseline"]["tokens_in_layers"]
        yield f"{bench.subject}: all tokens", base
        for row in bench.results["configs"]:
            if row["tokens_in_layers"]:
                yield (
                    f"{bench.subject}: {label(row['method'], row['keep'])}",
                    row["tokens_in_layers"],
                )
    for run in findings.runs:
        for task in run.results["tasks"]:
            for row in run.rows(task):
                if row["visual_layers"]:
                    yield f"{task}: {label(row['method'], row['keep'])}", row["visual_layers"]
