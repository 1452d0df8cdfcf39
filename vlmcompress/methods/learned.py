"""What a method learns: a module of its own beside the model, and its file.

The module never becomes part of the model: neither its state dict nor its parameters show it, and
nothing of it stays when the method is taken off. One file holds it, safetensors with a header that
says what it was made for; a pickle is never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmcompress.core.errors import CheckpointError, ConfigError, ConfigTypeError, EvidenceError

FORMAT = 1
_HEADER = "vlmcompress"


class Learned(nn.Module):
    """Trained parts of one method for one tower, in float32.

    Attributes:
        config: what they were made for, JSON-ready; another tower or other options need others.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config: dict[str, Any] = json.loads(json.dumps(config))  # tuples become lists

    def follow(self, device: torch.device) -> None:
        """Move to where a model has been moved; optimisers keep their parameters."""
        if any(parameter.device != device for parameter in self.parameters()):
            self.to(device)

    def released(self, name: str, tensor: Tensor) -> Tensor:
        """What a tensor of the authors' file is here; another where their files have changed."""
        return tensor

    def save(self, path: str | Path) -> None:
        """Write parts and config in one file; a crash leaves either the old or the new one.

        Raises:
            CheckpointError: when it cannot be written.
        """
        path = Path(path)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        header = {_HEADER: json.dumps({"format": FORMAT, **self.config})}
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, str(partial), metadata=header)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            raise CheckpointError(
                f"{path} cannot be written ({error}); name a file in a folder that exists and has "
                "room."
            ) from error

    @torch.no_grad()
    def load(self, path: str | Path) -> None:
        """Take over what a file holds; when it cannot be, nothing is changed.

        Raises:
            CheckpointError: for a file that is missing, broken, newer or not whole.
            ConfigError: for one that was made for something else.
        """
        path = Path(path)
        config, tensors = _read(path)
        self._check_config(path, config)
        own = self.state_dict()
        _check_tensors(path, own, tensors)
        for name, value in own.items():
            value.copy_(tensors[name])

    def _check_config(self, path: Path, found: Mapping[str, Any]) -> None:
        other = [
            f"{name} {found.get(name)!r} instead of {self.config.get(name)!r}"
            for name in sorted({*found, *self.config})
            if found.get(name) != self.config.get(name)
        ]
        if other:
            raise ConfigError(
                f"{path} was made for {', '.join(other)}; give the options and the budget that it "
                "was trained with, or another file."
            )


Parts = TypeVar("Parts", bound=Learned)


def fresh(make: Callable[[], Parts], seed: int, weights: str | None) -> Parts:
    """Parts from a file, or untrained and equal for equal seeds; no random state is touched.

    Where `meta` is the default device only their shapes are made: for models that are looked at
    without weights.

    Args:
        make: makes the parts, drawing from the global generator.
        seed: of what is drawn.
        weights: their file; None leaves them untrained.

    Raises:
        CheckpointError, ConfigError: as `Learned.load`.
    """
    if torch.get_default_device().type == "meta":
        return make()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        parts = make().float()
    if weights is not None:
        parts.load(weights)
    return parts


def drawn_for(device: torch.device) -> AbstractContextManager[Any]:
    """Where parts for a model on a device are made: without numbers for one that has none.

    The weights of a model on the `meta` device are shapes, and parts can be as large as its layers.
    """
    return torch.device("meta") if device.type == "meta" else nullcontext()


def required(parts: nn.Module | None, kind: type[Parts], where: str) -> Parts:
    """The parts of a method that acts in the tower or in the LLM (`where`).

    Raises:
        EvidenceError: when there are none of that kind.
    """
    if not isinstance(parts, kind):
        raise EvidenceError(
            f"A method in the {where} needs its trained parts ({kind.__name__}), and the state has "
            f"{type(parts).__name__}; pass what its `parts` makes."
        )
    return parts


def check_weights(method: str, weights: object) -> None:
    """Check an option that must name a file, or none.

    Raises:
        ConfigTypeError: for anything but a string or None.
    """
    if weights is not None and not isinstance(weights, str):
        raise ConfigTypeError(
            f"{method}'s weights are {weights!r}; give the path of a .safetensors file as a string."
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), "pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_unusable(path, error)) from error
    if header is None:
        raise CheckpointError(_unusable(path, "its header does not say what it was made for"))
    try:
        config = json.loads(header)
    except json.JSONDecodeError as error:
        raise CheckpointError(_unusable(path, error)) from error
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise CheckpointError(_unusable(path, "its header names no format"))
    if config["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {config['format']}, and this vlmcompress reads up to {FORMAT}; "
            "upgrade vlmcompress."
        )
    return {name: value for name, value in config.items() if name != "format"}, tensors


def _check_tensors(path: Path, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    if missing or unknown:
        what = [f"it lacks {name}" for name in missing] + [f"{name} is unknown" for name in unknown]
        raise CheckpointError(_unusable(path, ", ".join(what[:4])))
    for name, value in own.items():
        given = found[name]
        if given.shape != value.shape:
            shapes = f"{tuple(given.shape)} instead of {tuple(value.shape)}"
            raise CheckpointError(_unusable(path, f"{name} has shape {shapes}"))
        if not given.is_floating_point():
            raise CheckpointError(_unusable(path, f"{name} holds {given.dtype}, not floats"))
        if not bool(given.isfinite().all()):
            raise CheckpointError(_unusable(path, f"{name} holds NaN or infinity"))


def _unusable(path: Path, why: object) -> str:
    return f"{path} holds no usable weights of a method ({why}); give a file that `save` wrote."
