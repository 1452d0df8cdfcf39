"""Starts a command in several processes, as a user of accelerate does."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.project import ROOT

#: Two whole copies of a model, which talk through gloo where there is no GPU.
TWO = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")


def accelerate(*words: object) -> None:
    """`accelerate launch WORDS`, to its end."""
    port = ("--main_process_port", "0")  # any that is free
    on_cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *port, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **on_cpu},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
