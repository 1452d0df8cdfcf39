"""Memory: each configuration in a process of its own, weights apart."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from eval_harness import memory, requests, shapes

MIB = 2**20


def make(log: str | None = None):
    if log is not None:
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
    model = shapes.build("tiny")
    return model, requests.of_shape(model), None


def killed():
    os._exit(9)


@pytest.mark.slow
def test_a_process_for_each(tmp_path):
    log = tmp_path / "processes"
    rows = memory.peaks(partial(make, str(log)), [("none", None), ("uniform", 0.25)])
    processes = log.read_text(encoding="utf-8").split()
    assert len(set(processes)) == 2
    assert str(os.getpid()) not in processes
    assert [(row["method"], row["keep"]) for row in rows] == [("none", None), ("uniform", 0.25)]
    weights = sum(p.nbytes for p in shapes.build("tiny").parameters())
    for row in rows:
        assert weights <= row["weights"] < 1.1 * weights
        assert row["weights"] < row["before"] <= row["resident"]


def test_a_process_that_is_killed_is_told():
    (row,) = memory.peaks(killed, [("none", None)])
    assert "killed" in row["error"]


def _peaks() -> list[int]:
    """Bytes that a small and a large call add to what the process holds."""

    def take(size: int) -> None:
        torch.ones(size * MIB, dtype=torch.uint8).add_(1)

    take(400)
    found = [memory._watched(torch.device("cpu"), lambda n=n: take(n)) for n in (1, 200)]
    return [one["resident"] - one["before"] for one in found]


@pytest.mark.skipif(not memory._reset_resident_peak(), reason="the system keeps the peak")
def test_the_peak_is_of_the_call_alone():
    # In a process of its own, as it is used: other tests leave free pages behind to be used again.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        small, large = pool.submit(_peaks).result()
    assert small < 100 * MIB
    assert large > 150 * MIB
