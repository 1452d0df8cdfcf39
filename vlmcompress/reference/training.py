"""Train the reference model from scratch: on two CPU cores in under two hours."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from vlmcompress.core.errors import ConfigError

from .card import card
from .checkpoint import read_state
from .curve import training_log
from .exporting import export
from .model import Shape
from .worker import Job, run_job

APART = 0.28  # share of the time that tower and language model learn apart
DRILL = 0.12  # then the language model alone, on all cores: it is the slower learner
_PRECISIONS = ("bfloat16", "float32")
_BATCH = {"tower": 16, "language": 8, "joint": 8}
# Threads that wait must sleep (the cores are shared), and big buffers must be kept (page faults
# took a quarter of a step).
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def _jobs(
    common: dict, minutes: float | None, steps: int | None, processes: int
) -> list[list[Job]]:
    """Groups of jobs that run at the same time, one group after the other."""

    def budget(share: float) -> dict:
        return {
            "minutes": minutes * share if minutes else None,
            "steps": max(1, round(steps * share)) if steps else None,
        }

    joint = 1 - APART - DRILL
    if processes == 1:
        shares = {"tower": APART / 2, "language": APART / 2 + DRILL, "joint": joint}
        return [[Job(stage=s, **budget(share), **common)] for s, share in shares.items()]

    def together(stage: str, share: float) -> list[Job]:
        return [
            Job(stage=stage, rank=rank, world=processes, **budget(share), **common)
            for rank in range(processes)
        ]

    apart = [Job(stage=s, **budget(APART), **common) for s in ("tower", "language")]
    return [apart, together("language", APART + DRILL), together("joint", joint)]


def _done(job: Job) -> bool:
    state = read_state(job.checkpoint)
    return state is not None and job.progress(state["step"], state["seconds"]) >= 1


def _run_group(jobs: list[Job]) -> None:
    """Run jobs in processes of their own and wait for all.

    Raises:
        RuntimeError: if one of them fails; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        failures = context.SimpleQueue()
        workers = [context.Process(target=run_job, args=(job, failures, meeting)) for job in jobs]
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers):
                for worker in workers:
                    worker.join(timeout=1)
                if any(worker.exitcode for worker in workers):
                    break
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
        if not failures.empty():
            raise failures.get()
    failed = [w.exitcode for w in workers if w.exitcode]
    if failed:
        raise RuntimeError(
            f"training process ended with exit code {failed[0]}; run again to resume"
        )


def train(
    output_dir: str | Path,
    *,
    minutes: float | None = 95.0,
    steps: int | None = None,
    resume: bool = True,
    processes: int = 2,
    device: str = "auto",
    seed: int = 0,
    shape: Shape | None = None,
    batch: dict[str, int] | None = None,
    pulse: float = 60.0,
    test_scenes: int = 340,
    start: str | Path | None = None,
    gentle: float = 1.0,
    precision: str = "bfloat16",
) -> Path:
    """Train and export the reference model.

    The tower learns to say what each patch shows, the language model to answer from such words;
    then both learn together on real images, with tokens dropped. A killed run continues from its
    last checkpoint.

    Args:
        output_dir: checkpoints, ``log.jsonl`` and, at the end, the folder ``weights`` with its card
            and ``training_log.json``.
        minutes: wall-clock budget; ignored when ``steps`` is given.
        steps: budget in optimiser steps over all stages, for tests and for exact repetition.
        resume: continue what lies in ``output_dir``; otherwise its checkpoints are removed.
        processes: one-thread CPU processes; a GPU takes one.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        seed: of weights, scenes and dropping.
        shape: sizes of the model; the default is the one that ships.
        batch: scenes per step and process of some stages, by stage name.
        pulse: seconds between checkpoints.
        test_scenes: scenes of the test split that the finished model is measured on.
        start: folder of a finished run to go on from, with new scenes and the whole schedule again.
        gentle: factor on all learning rates, for a model that has learned already.
        precision: of the passes, ``"bfloat16"`` or ``"float32"``; weights are float32.

    Returns:
        The folder with the exported weights.

    Raises:
        ConfigError: without a budget, for an unknown precision, if ``start`` is no finished run, or
            if the folder holds a run of other sizes, seed or batch.
        CheckpointError: if a checkpoint cannot be written (a full disk) or read.
        RuntimeError: if a training process dies.
    """
    if steps is None and not (minutes and minutes > 0):
        raise ConfigError(f"minutes={minutes!r}: give a budget above 0, or steps")
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision={precision!r}: allowed are {', '.join(_PRECISIONS)}")
    if start is not None and not (Path(start) / "joint.safetensors").exists():
        raise ConfigError(f"start={str(start)!r} holds no joint.safetensors: name a finished run")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        for old in [*folder.glob("*.safetensors"), folder / "log.jsonl"]:
            old.unlink(missing_ok=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = processes if device == "cpu" else 1
    common: dict[str, Any] = {
        "folder": folder,
        "seed": seed,
        "device": device,
        "shape": shape or Shape(),
        "pulse": pulse,
        "start": Path(start) / "joint.safetensors" if start is not None else None,
        "gentle": gentle,
        "precision": precision,
    }
    sizes = {**_BATCH, **(batch or {})}
    missing = {k: v for k, v in _ENVIRONMENT.items() if k not in os.environ}
    os.environ.update(missing if device == "cpu" else {})
    try:
        for group in _jobs(common, None if steps else minutes, steps, processes):
            jobs = [Job(**{**vars(job), "batch": sizes[job.stage]}) for job in group]
            left = [job for job in jobs if not _done(job)]
            if left:
                _run_group(left)
    finally:
        for key in missing:
            os.environ.pop(key, None)
    weights = export(folder, folder / "weights", shape=common["shape"], seed=seed)
    log = training_log(folder, weights, test_scenes, start)
    (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    (weights / "README.md").write_text(card(log))
    return weights
