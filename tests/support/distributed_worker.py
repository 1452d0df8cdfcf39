"""One rank of the processes that test_distributed.py starts: prints what held."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from tests import tiny
from tests.support import same
from vlmcompress import patch


def sharded(model):
    """Every layer of tower and language model, and what remains."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tower = same.tower(model)[1]
    layers = tower.blocks if hasattr(tower, "blocks") else tower.encoder.layers
    for layer in (*layers, *model.model.language_model.layers):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def losses(model, call):
    """The loss before and after one step; all ranks see the same batch."""
    optimiser = SGD(model.parameters(), lr=0.1)
    first = model(**call).loss
    first.backward()
    optimiser.step()
    return torch.stack([first, model(**call).loss]).detach()


def step_holds(family, wrap):
    """Whether a wrapped model trains as one process does, patched and with everything kept."""

    def run(keep, wrapped):
        model = tiny.build(family)
        if keep is not None:
            patch(model, keep=keep)
        return losses(wrap(model) if wrapped else model, call)

    call = same.labelled(same.mixed(tiny.build(family)))
    compressed = torch.allclose(run(same.KEEP, True), run(same.KEEP, False), atol=1e-5)
    return compressed and torch.equal(run(1.0, True), run(None, True))


def generate_holds(family):
    """Whether a freshly sharded model generates what one process does."""
    model = tiny.build(family)
    call = same.mixed(model)
    want = same.patched(tiny.build(family), call)
    patch(model, keep=same.KEEP)
    register_fsdp_forward_method(sharded(model), "generate")
    same.assert_same(same.seen(model, call), want)
    return True


def data_parallel(model):
    # The last tower layer is skipped and gets no gradient.
    return DistributedDataParallel(model, find_unused_parameters=True)


def main():
    dist.init_process_group("gloo")
    found = {
        "fsdp step llava": step_holds("llava", sharded),
        "fsdp step qwen2_vl": step_holds("qwen2_vl", sharded),
        "fsdp generate llava": generate_holds("llava"),
        "ddp step llava": step_holds("llava", data_parallel),
    }
    # In one write, so that the lines of two ranks do not mix.
    held = "".join(f"{name}\n" for name, holds in found.items() if holds)
    print(held, end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
