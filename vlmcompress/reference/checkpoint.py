"""Checkpoints of training: safetensors and json, replaced atomically, never a pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_SLOTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict
) -> None:
    """Write parameters, optimiser state and progress in one file.

    Args:
        path: the ``.safetensors`` file; a crash leaves either the old or the new one.
        module: its named parameters are stored.
        optimizer: AdamW over some of them.
        state: anything that json can hold; travels in the file's header.
    """
    tensors = {f"model/{name}": p.detach().contiguous() for name, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        for slot in _SLOTS:
            if slot in optimizer.state.get(parameter, {}):
                tensors[f"{slot}/{name}"] = optimizer.state[parameter][slot].detach().contiguous()
    partial = path.with_suffix(".partial")
    save_file(tensors, str(partial), metadata={"state": json.dumps(state)})
    os.replace(partial, path)


def read_state(path: Path) -> dict | None:
    """Progress stored in a checkpoint, or None if there is none."""
    if not path.exists():
        return None
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["state"])


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@torch.no_grad()
def load_parameters(path: Path, module: nn.Module, prefixes: tuple[str, ...] = ("",)) -> None:
    """Copy the stored parameters whose names start with one of the prefixes."""
    stored = _tensors(path)
    for name, parameter in module.named_parameters():
        if name.startswith(prefixes) and f"model/{name}" in stored:
            parameter.copy_(stored[f"model/{name}"])


@torch.no_grad()
def load_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Resume: parameters and optimiser state in place; returns the progress or None."""
    state = read_state(path)
    if state is None:
        return None
    load_parameters(path, module)
    stored = _tensors(path)
    for name, parameter in module.named_parameters():
        slots = {s: stored[f"{s}/{name}"].clone() for s in _SLOTS if f"{s}/{name}" in stored}
        if slots:
            device = parameter.device
            optimizer.state[parameter] = {
                s: t if s == "step" else t.to(device) for s, t in slots.items()
            }
    return state
