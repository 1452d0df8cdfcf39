"""What methods learn, and the files that hold it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmcompress.core.errors import CheckpointError, ConfigError, ConfigTypeError
from vlmcompress.methods import TowerReducer, create
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.tower.shape import TowerShape

SHAPE = TowerShape(width=12, head_dim=4, patches=36, cls_rows=1, depth=6, plan=(36, 9, 9, 4))
OPTIONS: dict[str, dict[str, Any]] = {
    "t2t": {"learned": True, "layers": (1, 3), "strides": (2, 2), "channels": 5},
    "sit": {"reverse": True},
    "sparsifiner": {"layers": (0, 2)},
}
every_method = pytest.mark.parametrize("name", OPTIONS)


def parts_of(name: str, shape: TowerShape = SHAPE, **more: Any) -> Learned:
    method = create(name, **OPTIONS[name], **more)
    assert isinstance(method, TowerReducer)
    parts = method.parts(shape)
    assert isinstance(parts, Learned)
    return parts


def trained(name: str) -> Learned:
    """Parts with other numbers than untrained ones."""
    parts, generator = parts_of(name), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return parts


def equal(a: Learned, b: Learned) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return list(own) == list(other) and all(torch.equal(own[n], other[n]) for n in own)


@pytest.fixture(params=OPTIONS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    path = tmp_path / "parts.safetensors"
    trained(request.param).save(path)
    return request.param, path


def change(path: Path, tensors: Callable[[dict[str, Tensor]], None], header: Any = None) -> None:
    """Write a file again with something changed."""
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    found = load_file(str(path))
    tensors(found)
    save_file(found, str(path), metadata=metadata if header is None else header)


def test_round_trip(saved: tuple[str, Path]):
    name, path = saved
    loaded = parts_of(name, weights=str(path))
    assert equal(loaded, trained(name))
    assert loaded.config == parts_of(name).config
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    assert [p.name for p in path.parent.iterdir()] == ["parts.safetensors"]
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["vlmcompress"])
    assert header["method"] == name
    assert header["format"] == 1


def test_half_precision_files_are_read(saved: tuple[str, Path]):
    name, path = saved
    change(path, lambda found: found.update({n: t.half() for n, t in found.items()}))
    loaded, want = parts_of(name, weights=str(path)), trained(name)
    for own, other in zip(loaded.parameters(), want.parameters(), strict=True):
        assert torch.equal(own, other.half().float())


@every_method
def test_equal_seeds_are_equal_parts_and_global_random_state_is_left_alone(name: str):
    state = torch.get_rng_state()
    first, again, other = parts_of(name), parts_of(name), parts_of(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first, again)
    assert not equal(first, other)
    assert first.config == other.config


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _no_safetensors(path: Path) -> None:
    path.write_bytes(b"this is no file of tensors")


def _drop_one(found: dict[str, Tensor]) -> None:
    del found[sorted(found)[0]]


def _first(to: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def set_first(found: dict[str, Tensor]) -> None:
        name = sorted(found)[0]
        found[name] = to(found[name]).contiguous()

    return set_first


def _header(**values: Any) -> Callable[[Path], None]:
    return lambda path: change(path, lambda found: None, {"vlmcompress": json.dumps(values)})


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "no usable weights"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "no usable weights"),
    "cut": (_cut, "no usable weights"),
    "another format": (_no_safetensors, "no usable weights"),
    "empty": (lambda path: path.write_bytes(b""), "no usable weights"),
    "no header": (lambda path: change(path, lambda f: None, {"x": "y"}), "what it was made for"),
    "no json": (lambda path: change(path, lambda f: None, {"vlmcompress": "{"}), "no usable"),
    "a list": (lambda path: change(path, lambda f: None, {"vlmcompress": "[]"}), "no format"),
    "no format": (_header(method="sit"), "names no format"),
    "newer": (_header(format=2), "has format 2.*upgrade"),
    "lacks one": (lambda path: change(path, _drop_one), "it lacks"),
    "one too many": (
        lambda path: change(path, lambda f: f.update(extra=torch.ones(1))),
        "extra is unknown",
    ),
    "shape": (lambda path: change(path, _first(lambda t: t[None])), "has shape"),
    "ints": (lambda path: change(path, _first(lambda t: t.long())), "torch.int64, not floats"),
    "nan": (lambda path: change(path, _first(lambda t: t * torch.nan)), "NaN or infinity"),
    "infinity": (lambda path: change(path, _first(lambda t: t + torch.inf)), "NaN or infinity"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files(saved: tuple[str, Path], how: str):
    name, path = saved
    breaks, message = BROKEN[how]
    breaks(path)
    parts = trained(name)
    with pytest.raises(CheckpointError, match=message):
        parts.load(path)
    assert equal(parts, trained(name))
    with pytest.raises(CheckpointError, match=message):
        parts_of(name, weights=str(path))


def test_files_for_something_else(saved: tuple[str, Path]):
    name, path = saved
    other = next(n for n in OPTIONS if n != name)
    with pytest.raises(ConfigError, match=f"made for.*method '{name}' instead of '{other}'"):
        parts_of(other, weights=str(path))
    wide = TowerShape(24, 8, 36, 1, 6, SHAPE.plan)
    with pytest.raises(ConfigError, match=r"made for.*(width 12|head_dim 4) instead of"):
        parts_of(name, wide, weights=str(path))


@pytest.mark.parametrize(
    ("name", "option", "value", "match"),
    [
        ("t2t", "strides", (3, 2), "strides"),
        ("t2t", "overlap", 2, "overlap 1 instead of 2"),
        ("t2t", "channels", 6, "channels 5 instead of 6"),
        ("sit", "reverse", False, "reverse 36 instead of None"),
        ("sit", "hidden", 0.25, "hidden 6 instead of 3"),
        ("sparsifiner", "layers", (0,), r"layers \[0, 2\] instead of \[0\]"),
        ("sparsifiner", "narrow", 4, "narrow 2 instead of 1"),
        ("sparsifiner", "rank", 4, "rank"),
    ],
)
def test_files_for_other_options(tmp_path: Path, name: str, option: str, value: Any, match: str):
    path = tmp_path / "parts.safetensors"
    trained(name).save(path)
    method = create(name, **{**OPTIONS[name], option: value, "weights": str(path)})
    assert isinstance(method, TowerReducer)
    plan = (36, 4, 4, 1) if option == "strides" else SHAPE.plan
    with pytest.raises(ConfigError, match=match):
        method.parts(TowerShape(12, 4, 36, 1, 6, plan))


@every_method
def test_what_cannot_be_written(name: str, tmp_path: Path):
    parts = trained(name)
    with pytest.raises(CheckpointError, match="cannot be written"):
        parts.save(tmp_path / "nowhere" / "parts.safetensors")
    path = tmp_path / "parts.safetensors"
    parts.save(path)
    before = path.read_bytes()
    (tmp_path / "parts.safetensors.partial").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        parts_of(name).save(path)
    assert path.read_bytes() == before


@every_method
def test_weights_are_named_by_a_string(name: str):
    for wrong in (Path("x"), 3, b"x"):
        with pytest.raises(ConfigTypeError, match=r"path of a \.safetensors file"):
            create(name, weights=wrong)
