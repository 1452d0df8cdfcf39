"""Weights as their authors released them: where every tensor lies, and how it gets into our parts.

One JSON file per method lists names, shapes and dtype, with the source they were read from. Parts
bear the names of the released modules, so that a name in a file is a prefix and a name in the
parts. The lists were read from the code that writes such files, not from the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmcompress.core.errors import CheckpointError, ConfigError
from vlmcompress.methods.learned import Learned

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


@dataclass(frozen=True)
class Layout:
    """What a released file holds of one method.

    Attributes:
        method: its name here.
        source: where the list was read.
        dtype: of all its tensors, as torch calls it.
        prefix: of their names in the file.
        sizes: of the released model, by the names that `tensors` uses.
        tensors: shape of each, as ints, names of sizes, or products such as "3*width"; `{i}` in a
            name stands for the numbers below `repeats`.
        repeats: name of the size that says how often; "" where no name has `{i}`.
    """

    method: str
    source: str
    dtype: str
    prefix: str
    sizes: Mapping[str, int]
    tensors: Mapping[str, tuple[int | str, ...]]
    repeats: str = ""

    def shapes(self, sizes: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
        """Shapes by full name in the file.

        Args:
            sizes: in place of the released model's.

        Raises:
            ConfigError: when a size is missing.
        """
        known = self.sizes if sizes is None else sizes
        absent = sorted(set(self.sizes) - set(known))
        if absent:
            raise ConfigError(f"The released layout of {self.method} also needs {absent}.")
        times = range(known[self.repeats]) if self.repeats else range(1)
        return {
            self.prefix + name.replace("{i}", str(i)): tuple(_size(s, known) for s in shape)
            for name, shape in self.tensors.items()
            for i in (times if "{i}" in name else range(1))
        }


@cache
def layout(method: str) -> Layout:
    """The list of one method.

    Raises:
        ConfigError: for a method without one, naming those that have one.
    """
    lists = {
        entry.name.removesuffix(".json"): entry
        for entry in files(__package__).iterdir()
        if entry.name.endswith(".json")
    }
    if method not in lists:
        raise ConfigError(
            f"No released weights are known of {method!r}; they are of {', '.join(sorted(lists))}."
        )
    values = json.loads(lists[method].read_text(encoding="utf-8"))
    values["tensors"] = {name: tuple(shape) for name, shape in values["tensors"].items()}
    return Layout(**values)


@torch.no_grad()
def load_released(parts: Learned, path: str | Path) -> None:
    """Take over what the authors' checkpoint holds; when it cannot be, nothing is changed.

    Args:
        parts: of a method with a layout, made for the model of the checkpoint.
        path: a safetensors file, or a model's folder with one or several. Pickles are never read.

    Raises:
        CheckpointError: for a file that is missing, broken, or lacks tensors or fits none.
        ConfigError: for a method without a layout.
    """
    prefix, own = layout(parts.config["method"]).prefix, parts.state_dict()
    found = tensors(path, (prefix + name for name in own))
    taken = {name: parts.released(name, found[prefix + name]) for name in own}
    for name, value in own.items():
        check_tensor(path, prefix + name, taken[name], value.shape)
    for name, value in own.items():
        value.copy_(taken[name])


def tensors(path: str | Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, and only those; files without any of them stay closed.

    Raises:
        CheckpointError: for a file that is missing, broken or a pickle, or lacks a name.
    """
    wanted, found = list(names), dict[str, Tensor]()
    where = _places(Path(path), wanted)
    absent = [name for name in wanted if name not in where]
    for file in dict.fromkeys(where.values()):
        with _opened(file) as archive:
            held = set(archive.keys())
            here = [name for name in wanted if where.get(name) == file]
            absent += [name for name in here if name not in held]
            found |= {name: archive.get_tensor(name) for name in here if name in held}
    if absent:
        raise CheckpointError(
            f"{path} lacks {', '.join(absent[:4])}{', ...' if len(absent) > 4 else ''}; give the "
            "checkpoint that the authors released."
        )
    return found


def check_tensor(path: str | Path, name: str, found: Tensor, shape: Iterable[int]) -> None:
    """Refuse a tensor of a checkpoint that cannot be used.

    Raises:
        CheckpointError: for another shape, numbers that are no floats, NaN or infinity.
    """
    if tuple(found.shape) != tuple(shape):
        why = f"has shape {tuple(found.shape)}, and these parts have {tuple(shape)}"
    elif not found.is_floating_point():
        why = f"holds {found.dtype}, not floats"
    elif not bool(found.isfinite().all()):
        why = "holds NaN or infinity"
    else:
        return
    raise CheckpointError(f"{name} of {path} {why}; make the parts for the released model.")


def _places(path: Path, names: Iterable[str]) -> dict[str, Path]:
    """The file of each name, as far as a folder's index knows."""
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, and pickles are never read; convert it to safetensors where you "
            "trust it."
        )
    if not path.is_dir():
        return dict.fromkeys(names, path)
    index = path / _INDEX
    if not index.is_file():
        return dict.fromkeys(names, path / _WHOLE)
    try:
        known = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: path / Path(known[name]).name for name in names if name in known}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of weights ({error!r}).") from error


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(str(file), "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); give a safetensors file or a folder with one."
        ) from error


def _size(size: int | str, known: Mapping[str, int]) -> int:
    """A size: an int, a name, or a product of both such as "3*width"."""
    if isinstance(size, int):
        return size
    product = 1
    for factor in size.split("*"):
        product *= int(factor) if factor.isdigit() else known[factor]
    return product
