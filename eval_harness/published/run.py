"""Ours beside what papers print, measured by lmms-eval where checkpoint and data are at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from eval_harness.lmms.runs import Outcome, Run, go, installed
from eval_harness.published.values import Benchmark, Published, Row
from eval_harness.sweep.naming import unknown
from vlmcompress.core.errors import ConfigError

#: A method of the papers and its budget.
Setting = tuple[str, int]


@dataclass(frozen=True)
class Comparison:
    """What is measured.

    Attributes:
        values: of the papers.
        rows: those of `values` that are shown.
        benchmarks: keys of those that are shown.
        out: folder for what lmms-eval writes.
        checkpoint: a folder or hub id; that of the values where None.
        device, limit, online: as `Run` takes them.
    """

    values: Published
    rows: Sequence[Row]
    benchmarks: Sequence[str]
    out: Path = Path("runs/published")
    checkpoint: str | None = None
    device: str | None = None
    limit: int | None = None
    online: bool = False

    def __post_init__(self) -> None:
        """Check the benchmarks.

        Raises:
            ConfigError: for an unknown one, with near names.
        """
        for key in self.benchmarks:
            if key not in self.values.benchmarks:
                raise ConfigError(unknown("benchmark", key, self.values.benchmarks))

    @property
    def model(self) -> str:
        """The checkpoint."""
        return self.checkpoint or self.values.model

    @property
    def runnable(self) -> dict[str, Benchmark]:
        """Benchmarks that lmms-eval runs, by key."""
        chosen = {key: self.values.benchmarks[key] for key in self.benchmarks}
        return {key: benchmark for key, benchmark in chosen.items() if benchmark.task}

    def runs(self) -> dict[Setting, Run]:
        """One start of lmms-eval for each setting that has a name here, the full model first."""
        settings = dict.fromkeys((row.method, row.tokens) for row in self.rows)
        found = {}
        for name, tokens in settings:
            method = self.values.methods[name]
            if not method.ours and name != "full":
                continue
            own = {"method": method.ours, "keep": tokens, "clip": method.clip}
            found[name, tokens] = Run(
                {"pretrained": self.model, **(own if method.ours else {})},
                list(dict.fromkeys(benchmark.task for benchmark in self.runnable.values())),
                self.out / f"{method.ours or name}-{tokens}",
                device=self.device,
                limit=self.limit,
                online=self.online,
            )
        return found


def measure(
    wanted: Comparison,
    runner: Callable[[Run], Outcome] = go,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run what can be run.

    Args:
        wanted: what is measured.
        runner: starts lmms-eval.
        say: is told each command before it runs.

    Returns:
        `table`, with the scores under `ours`.

    Raises:
        ConfigError: naming all of lmms-eval, checkpoint and data that is not at hand.
        ResultsError: when lmms-eval ends without results, or without a metric.
    """
    _require_all(wanted)
    scores = {}
    for setting, run in wanted.runs().items():
        say(str(run))
        outcome = runner(run)
        scores[setting] = {
            key: benchmark.scale * sum(outcome.metric(benchmark.task, m) for m in benchmark.metric)
            for key, benchmark in wanted.runnable.items()
        }
    return table(wanted, scores)


def missing(wanted: Comparison) -> list[str]:
    """What has to be installed or downloaded first, each with how."""
    found = []
    if not installed():
        found.append('lmms-eval (pip install "vlmcompress[lmms]")')
    if wanted.online:
        return found
    if not _has_checkpoint(wanted.model):
        found.append(f"the checkpoint (hf download {wanted.model}, or --checkpoint FOLDER)")
    sets = {benchmark.dataset for benchmark in wanted.runnable.values()}
    return found + [
        f"data (hf download --repo-type dataset {name})"
        for name in sorted(sets)
        if not _has_dataset(name)
    ]


def _require_all(wanted: Comparison) -> None:
    lacking = missing(wanted)
    if lacking:
        told = "\n".join(f"- {what}" for what in lacking)
        raise ConfigError(
            f"{wanted.values.name} cannot be measured here. There is no\n{told}\n"
            "--download lets lmms-eval fetch what is on the Hub; --list prints the published "
            "values alone."
        )


def _has_checkpoint(model: str) -> bool:
    if Path(model).is_dir():
        return (Path(model) / "config.json").is_file()
    return isinstance(try_to_load_from_cache(model, "config.json"), str)


def _has_dataset(name: str) -> bool:
    folder = repo_folder_name(repo_id=name, repo_type="dataset")
    return any((Path(constants.HF_HUB_CACHE) / folder / "snapshots").glob("*"))


def table(
    wanted: Comparison, scores: dict[Setting, dict[str, float]] | None = None
) -> dict[str, Any]:
    """Published values, and ours where they are measured, JSON-ready.

    Returns:
        `model`, `benchmarks` and `sources` as far as they are shown, and `rows`: `method`,
        `tokens`, `sources` and `values` of each, with `sources` `["ours"]` for ours, which follow
        the published ones of their setting.
    """
    rows: list[dict[str, Any]] = []
    settings = dict.fromkeys((row.method, row.tokens) for row in wanted.rows)
    for method, tokens in settings:
        for row in wanted.rows:
            shown = {k: v for k, v in row.values.items() if k in wanted.benchmarks}
            if (row.method, row.tokens) == (method, tokens) and shown:
                found = {**dataclasses.asdict(row), "sources": [*row.sources]}
                rows.append({**found, "values": shown})
        ours = (scores or {}).get((method, tokens))
        if ours is not None:
            rows.append({"method": method, "tokens": tokens, "sources": ["ours"], "values": ours})
    cited = {key for row in rows for key in row["sources"]}
    return {
        "name": wanted.values.name,
        "model": wanted.model if scores else wanted.values.model,
        "limit": wanted.limit if scores else None,
        "benchmarks": {
            key: dataclasses.asdict(wanted.values.benchmarks[key]) for key in wanted.benchmarks
        },
        "sources": {k: dict(v) for k, v in wanted.values.sources.items() if k in cited},
        "methods": {
            name: dataclasses.asdict(wanted.values.methods[name])
            for name in dict.fromkeys(row["method"] for row in rows)
        },
        "rows": rows,
    }
