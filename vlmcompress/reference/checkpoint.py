"""Checkpoints of training: safetensors and json, replaced atomically, never a pickle."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmcompress.core.errors import CheckpointError, ConfigError

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

    Raises:
        CheckpointError: if it cannot be written; the file that was there stays.
    """
    tensors = {f"model/{name}": p.detach().contiguous() for name, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        for slot in _SLOTS:
            if slot in optimizer.state.get(parameter, {}):
                tensors[f"{slot}/{name}"] = optimizer.state[parameter][slot].detach().contiguous()
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, str(partial), metadata={"state": json.dumps(state)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        raise CheckpointError(
            f"{path} cannot be written ({error}); the checkpoint before it is untouched. "
            f"Make room for {math.ceil(size / 2**20)} MiB and run again to resume."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A checkpoint, open for reading.

    Raises:
        CheckpointError: if it is none, or not a whole one.
    """
    try:
        with safe_open(str(path), "pt") as file:
            if "state" not in (file.metadata() or {}):
                raise CheckpointError(_unreadable(path, "it holds no training state"))
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_unreadable(path, error)) from error


def _unreadable(path: Path, why: object) -> str:
    return (
        f"{path} is no whole checkpoint ({why}). Put a copy back, or delete the file to repeat its "
        "stage, or start anew with resume=False."
    )


def read_state(path: Path) -> dict | None:
    """Progress stored in a checkpoint, or None if there is none.

    Raises:
        CheckpointError: if the file is no whole checkpoint.
    """
    if not path.exists():
        return None
    with _opened(path) as file:
        try:
            return json.loads(file.metadata()["state"])
        except json.JSONDecodeError as error:
            raise CheckpointError(_unreadable(path, error)) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@torch.no_grad()
def load_parameters(path: Path, module: nn.Module, prefixes: tuple[str, ...] = ("",)) -> None:
    """Copy the stored parameters whose names start with one of the prefixes.

    Raises:
        CheckpointError: if the file is no whole checkpoint, or lacks one of them.
        ConfigError: if it belongs to a model of another shape.
    """
    stored = _tensors(path)
    for name, parameter in module.named_parameters():
        if name.startswith(prefixes):
            found = stored.get(f"model/{name}")
            if found is None:
                raise CheckpointError(_unreadable(path, f"it lacks {name}"))
            if found.shape != parameter.shape:
                raise ConfigError(
                    f"{path} holds {name} of shape {tuple(found.shape)}, this model has "
                    f"{tuple(parameter.shape)}: train with the sizes of that run, or in another "
                    "folder."
                )
            parameter.copy_(found)


@torch.no_grad()
def load_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Resume: parameters and optimiser state in place; returns the progress or None.

    Raises:
        CheckpointError, ConfigError: as `load_parameters`.
    """
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
