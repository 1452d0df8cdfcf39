"""Batch inference by Ray Data: pictures through patched models in actors, on one machine or many.

Tasks read rows and their pictures, actors hold a model each and answer, and the process that
started it all keeps the answers as they come.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_harness.provenance import versions
from eval_harness.shelf import Shelved
from eval_harness.sweep import store
from eval_harness.sweep.settings import Setting, identity_of
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.keep import parse_keep
from vlmcompress.hub.fetching import locate
from vlmcompress.integrations import parts, sources
from vlmcompress.integrations.actor import Actor, checked
from vlmcompress.integrations.cluster import Cluster, ray_of, started
from vlmcompress.methods import pipeline

SUMMARY = "summary.json"


@dataclass(frozen=True)
class BatchPlan:
    """What is done with each row.

    Attributes:
        model: a hub id, a folder that every machine sees, or `reference`.
        method: a name or a spec string; the tower's default where there is a budget alone.
        keep: its budget; without method, budget and adapter nothing is compressed.
        adapter: a trained one in place of the method: a folder that every machine sees, or a hub
            id.
        question: of rows that bring none.
        new_tokens: longest answer.
        dtype: of the model; `auto` takes the checkpoint's.
        positions: as `patch` takes them.
        seed: of methods that draw numbers.
        clip: for methods that read the question, as `vlmcompress generate --clip` takes it.
        batch: rows at a time in an actor.
    """

    model: str = "reference"
    method: str | None = None
    keep: float | int | str | None = None
    adapter: str | None = None
    question: str | None = None
    new_tokens: int = 64
    dtype: str = "auto"
    positions: str = "auto"
    seed: int = 0
    clip: str | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ConfigError: for values that make no sense.
            UnknownMethodError: for an unknown method.
        """
        for name in ("new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.adapter is not None and self.method is not None:
            raise ConfigError(
                f"method is {self.method!r}, and the adapter {self.adapter!r} brings its own; give "
                "one of them."
            )
        if self.method is not None:
            pipeline.build(self.method, None if self.keep is None else parse_keep(self.keep))
        elif self.keep is not None:
            parse_keep(self.keep)

    def identity(self) -> dict[str, Any]:
        """JSON-ready, what answers depend on, sources of the methods included."""
        source = identity_of(Setting(self.method)) if self.method else ""
        if (trained := self.trained()) is not None:
            source = trained.digest
        return {**dataclasses.asdict(self), "source": source, "versions": versions()}

    def trained(self) -> Shelved | None:
        """The adapter.

        Raises:
            ConfigError, CheckpointError: for what is none.
        """
        return None if self.adapter is None else Shelved.of(locate(self.adapter))


def run(
    source: str | Path,
    folder: str | Path,
    plan: BatchPlan,
    cluster: Cluster | None = None,
    *,
    device: str = "auto",
    kind: str = "jsonl",
    part_rows: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask every row and keep every answer; rows that were answered or failed before are left out.

    Args:
        source: a JSONL or Parquet file, a folder with such, or a folder of pictures.
        folder: of the answers; of this run alone.
        plan: what is done with each row.
        cluster: where; one actor in this machine if not given.
        device: of the actors' models: `auto`, `cpu` or `cuda`.
        kind: of the parts: `jsonl` or `parquet`.
        part_rows: of a part at most.
        progress: called with how many rows are done and how many there are.

    Returns:
        JSON-ready: `rows`, `asked` (by this run), `answered`, `failed`, mean `tokens` of those
        answered, `seconds` and `actors`; also written to `summary.json`.

    Raises:
        ConfigError: for a source without rows, a folder of another run, or a model or method that
            cannot be.
        ResultsError: for a folder that another run writes to, or a full disk.
        MissingExtraError: without Ray.
    """
    ray_of()
    folder, cluster = Path(folder).resolve(), cluster or Cluster()
    kept = parts.Parts(folder, kind, part_rows)
    found = sources.open_source(Path(source).resolve())
    with store.locked(folder):
        store.claim(folder, {"common": plan.identity(), "tasks": found.identity, "settings": {}})
        told = _Told()
        done = bytearray(found.rows)
        for row in kept.rows():
            done[row["index"]] = 1
            told.note(row)
        before, start = told.rows, time.monotonic()
        waiting = _waiting(found, done)
        if progress:
            progress(before, found.rows)
        if waiting:
            with kept, started(cluster):
                for row in _asked_of(waiting, plan, cluster, device):
                    kept.add(row)
                    told.note(row)
                    if progress:
                        progress(told.rows, found.rows)
        summary = {
            "rows": found.rows,
            "asked": told.rows - before,
            **told.summary(),
            "seconds": round(time.monotonic() - start, 3),
            "actors": cluster.actors,
        }
        store.write_json(folder / SUMMARY, summary)
    return summary


def _waiting(found: sources.Source, done: bytearray) -> list[dict[str, Any]]:
    """Chunks with rows that nobody has asked."""
    chunks = []
    for chunk in found.chunks:
        places = range(chunk.first, chunk.first + chunk.count)
        over = tuple(i for i in places if done[i])
        if len(over) < chunk.count:
            chunks.append(dataclasses.asdict(dataclasses.replace(chunk, done=over)))
    return chunks


def _asked_of(
    chunks: list[dict[str, Any]], plan: BatchPlan, cluster: Cluster, device: str
) -> Iterator[dict[str, Any]]:
    """Answers, in the order in which they are ready."""
    ray = ray_of()
    data = ray.data
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    gpus = cluster.gpus
    if gpus is None:
        has = ray.cluster_resources().get("GPU", 0) > 0
        gpus = 1 if has and device != "cpu" else 0
    device = device if device != "auto" else ("cuda" if gpus else "cpu")
    rows = data.from_items(chunks, override_num_blocks=len(chunks))
    rows = rows.flat_map(sources.read, fn_kwargs={"question": plan.question})
    # Blocks of one batch: answers come as they are ready, and no actor waits for another.
    batches = rows.repartition(target_num_rows_per_block=plan.batch)
    answers = batches.map_batches(
        Actor,
        fn_constructor_args=(plan, device),
        batch_size=plan.batch,
        batch_format="pyarrow",
        compute=data.ActorPoolStrategy(size=cluster.actors),
        num_cpus=cluster.cpus,
        num_gpus=gpus,
    )
    for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from checked(batch.to_pylist())


class _Told:
    """Sums over answers."""

    def __init__(self) -> None:
        self.rows = self.failed = 0
        self._sums = dict.fromkeys(parts.COUNTS, 0)

    def note(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        if row["error"] is not None:
            self.failed += 1
            return
        for name in parts.COUNTS:
            self._sums[name] += row[name]

    def summary(self) -> dict[str, Any]:
        answered = self.rows - self.failed
        means = {name: total / max(1, answered) for name, total in self._sums.items()}
        return {"answered": answered, "failed": self.failed, "tokens": means}
