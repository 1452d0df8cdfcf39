"""The command line with CPUs that accelerate takes for accelerators, so that it shards on them."""

from __future__ import annotations

import os

import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from vlmcompress.cli import app

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    found = PartialState._prepare_backend
    PartialState._prepare_backend = lambda *a, **k: (found(*a, **k)[0], DistributedType.MULTI_GPU)
    dist.init_process_group("gloo")
    app()
