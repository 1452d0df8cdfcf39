"""Killed runs, full disks, damaged files: exact continuation, or an error that says what to do."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.reference.test_training import SMALL, TINY
from vlmcompress.core.errors import CheckpointError, ConfigError, UnsupportedModelError
from vlmcompress.loading import load
from vlmcompress.reference import train
from vlmcompress.reference.checkpoint import load_parameters, read_state, save_checkpoint
from vlmcompress.reference.curve import learning_curve
from vlmcompress.reference.worker import Job, Worker

EXACT = {**SMALL, "steps": 12, "processes": 1, "precision": "float32", "pulse": 0.0}


pytestmark = pytest.mark.usefixtures("one_thread")


def _train_in_a_group(folder):
    os.setsid()
    train(folder, **EXACT)


def _kill_at(folder: Path, stage: str, step: int) -> None:
    """Start a run and kill all its processes once a stage's checkpoint has reached a step."""
    process = multiprocessing.get_context("spawn").Process(target=_train_in_a_group, args=(folder,))
    process.start()
    checkpoint, deadline = folder / f"{stage}.safetensors", time.monotonic() + 120
    while time.monotonic() < deadline and (read_state(checkpoint) or {"step": 0})["step"] < step:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert read_state(checkpoint)["step"] >= step


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_model(tmp_path):
    """Bit for bit on the CPU in float32, whatever the kill interrupted."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    expected = train(once, **EXACT)
    _kill_at(twice, "joint", 2)
    found = train(twice, **EXACT)
    for name in ("model.safetensors", "text_head/model.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    steps = [row["step"] for row in learning_curve(twice / "log.jsonl") if row["stage"] == "joint"]
    assert steps == sorted(steps)


def _parameters(worker):
    return {n: p.detach().clone() for n, p in worker.stage.trainee.named_parameters()}


@pytest.mark.parametrize("stage", ["tower", "language", "joint"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_stage_equals_an_uninterrupted_one(tmp_path, stage, precision):
    begun = Worker(Job(tmp_path / "begun.safetensors", "tower", steps=1, batch=2, shape=TINY))
    (tmp_path / "once").mkdir()
    save_checkpoint(
        tmp_path / "start.safetensors",
        begun.stage.trainee,
        begun.optimizer,
        {"mix": begun.stage.mix.accuracy.tolist()},
    )
    start = tmp_path / "start.safetensors"
    for name in ("tower", "language"):  # what the joint stage begins with
        for folder in (tmp_path, tmp_path / "once"):
            if stage == "joint":
                (folder / f"{name}.safetensors").write_bytes(start.read_bytes())
    job = Job(tmp_path, stage, steps=4, batch=2, shape=TINY, precision=precision)
    once = Worker(replace(job, folder=tmp_path / "once"))
    once.run()
    first = Worker(job)
    for _ in range(2):
        first.train_step(job.progress(first.step, 0))
    first.save()
    second = Worker(job)
    assert second.step == 2
    second.run()
    expected, found = _parameters(once), _parameters(second)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class _Toy(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2)


def _save(path: Path, module: nn.Module, step: int = 1) -> None:
    optimizer = torch.optim.AdamW(module.parameters())
    module.linear(torch.ones(1, module.linear.in_features)).sum().backward()
    optimizer.step()
    save_checkpoint(path, module, optimizer, {"step": step})


@contextmanager
def _no_room(most: int) -> Iterator[None]:
    """No file grows beyond so many bytes, as on a full disk; child processes inherit it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_the_checkpoint_before(tmp_path):
    path, module = tmp_path / "tower.safetensors", _Toy(512)
    _save(path, module)
    before = path.read_bytes()
    with (
        _no_room(1000),
        pytest.raises(CheckpointError, match=r"untouched\. Make room for 1 MiB"),
    ):
        _save(path, module, step=2)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    _save(path, module, step=2)
    assert read_state(path)["step"] == 2


@pytest.mark.slow
def test_full_disk_stops_a_run_with_a_typed_error(tmp_path):
    with _no_room(100_000), pytest.raises(CheckpointError, match="run again to resume"):
        train(tmp_path, **EXACT)


def test_full_disk_under_the_log_is_said(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    worker = Worker(Job(tmp_path, "tower", steps=1, batch=2, shape=TINY))
    with pytest.raises(CheckpointError, match=r"log\.jsonl cannot be written \(.*No space left"):
        worker.log({})


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _garble(path: Path) -> None:
    path.write_bytes(b"not a checkpoint")


def _stateless(path: Path) -> None:
    save_file({"model/linear.weight": torch.zeros(2, 8)}, str(path))


def _bad_state(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, str(path), metadata={"state": "{"})


def _partless(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, str(path), metadata={"state": "{}"})


@pytest.mark.parametrize("damage", [_truncate, _garble, _stateless, _bad_state, _partless])
def test_damaged_checkpoint_is_named_with_the_remedies(tmp_path, damage):
    path, module = tmp_path / "joint.safetensors", _Toy()
    _save(path, module)
    damage(path)
    before = module.linear.weight.clone()
    read = load_parameters if damage is _partless else lambda path, _module: read_state(path)
    with pytest.raises(CheckpointError, match=r"joint\.safetensors is no whole.*resume=False"):
        read(path, module)
    assert torch.equal(module.linear.weight, before)


def test_run_with_a_damaged_checkpoint_stops_before_training(tmp_path):
    (tmp_path / "tower.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tower\.safetensors is no whole checkpoint"):
        train(tmp_path, **EXACT)


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    path = tmp_path / "joint.safetensors"
    _save(path, _Toy(8))
    with pytest.raises(ConfigError, match=r"linear\.weight of shape \(2, 8\), this model has"):
        load_parameters(path, _Toy(4))


@pytest.mark.parametrize(("key", "value"), [("seed", 5), ("batch", 3)])
def test_resuming_with_other_settings_is_refused(tmp_path, key, value):
    job = Job(tmp_path, "tower", steps=2, batch=2, shape=TINY)
    Worker(job).save()
    with pytest.raises(ConfigError, match=f"trained with {key}="):
        Worker(replace(job, **{key: value}))


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"precision": "float8"}, "allowed are bfloat16, float32"),
        ({"start": "nowhere"}, "name a finished run"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, argument, match):
    with pytest.raises(ConfigError, match=match):
        train(tmp_path / "run", **{**EXACT, **argument})
    assert not (tmp_path / "run").exists()


def test_log_forgets_what_a_resumed_run_repeats(tmp_path):
    rows = [
        {"stage": "joint", "step": step, "minutes": 5.0 * i, "validation": {"n": i}}
        for i, step in enumerate((25, 50, 75, 50, 75))
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, lines[0][:20]]))
    curve = learning_curve(tmp_path / "log.jsonl")
    assert [(p["step"], p["validation"]["n"]) for p in curve] == [
        (25, 0),
        (50, 1),
        (50, 3),
        (75, 4),
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_weights_folder_is_refused(tmp_path, name):
    from shutil import copytree

    from vlmcompress.reference import WEIGHTS_DIR

    folder = Path(copytree(WEIGHTS_DIR, tmp_path / "weights"))
    _truncate(folder / name)
    with pytest.raises(UnsupportedModelError, match="cannot be loaded"):
        load(str(folder))
