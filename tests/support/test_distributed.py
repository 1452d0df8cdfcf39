"""Several processes: FSDP and DistributedDataParallel over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import same

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished():
    """What two processes of `distributed_worker` reported; started once for all tests here."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.support.distributed_worker"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.support("FSDP (fully_shard): forward, loss, one step")
@same.families("llava", "qwen2_vl")
def test_fsdp(family, finished):
    """Losses before and after a step equal those of one process; keep all = unpatched."""
    assert finished.count(f"fsdp step {family}") == 2


@pytest.mark.slow
@pytest.mark.support("FSDP (fully_shard): generate, registered after patching")
@same.families("llava")
def test_fsdp_generate(family, finished):
    """With `register_fsdp_forward_method(model, "generate")`: the ids of one process."""
    assert finished.count(f"fsdp generate {family}") == 2


@pytest.mark.slow
@pytest.mark.support("DistributedDataParallel: forward, loss, one step")
@same.families("llava")
def test_ddp(family, finished):
    """Losses before and after a step equal those of one process; keep all = unpatched."""
    assert finished.count(f"ddp step {family}") == 2
