"""One of the processes that test_train_lora.py starts: two steps of its small plan."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch.distributed as dist

from tests.test_train_lora import SMALL
from vlmcompress.reference import load
from vlmcompress.training.data import Scenes
from vlmcompress.training.lora import train

if __name__ == "__main__":
    plan = dataclasses.replace(SMALL, dropout=0.0, steps=2)
    done = train(*load(), Path(sys.argv[1]), plan, Scenes())
    assert done.main == (dist.get_rank() == 0)
    dist.barrier()
    dist.destroy_process_group()
