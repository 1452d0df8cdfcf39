"""Batch inference by Ray Data: pictures through patched models in actors, on one machine or many.

Tasks read rows and their pictures, actors hold a model each and answer, and the process that
started it all keeps the answers as they come.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eval_harness.sweep import store
from vlmcompress.integrations import parts, sources
from vlmcompress.integrations.actor import Actor, checked
from vlmcompress.integrations.batchplan import BatchPlan
from vlmcompress.integrations.cluster import Cluster, ray_of, started

SUMMARY = "summary.json"


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
