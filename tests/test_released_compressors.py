"""Weights of compressors as their authors released them: names, shapes and numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.compressors import (
    compressor,
    every_method,
)
from vlmcompress.core.errors import (
    CheckpointError,
)
from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods.connector.c_abstractor import Abstractor
from vlmcompress.methods.connector.mqt import Queries
from vlmcompress.methods.connector.tokenpacker import Packing
from vlmcompress.methods.layouts import layout, load_released
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.trained import ConnectorShape

FIXTURE = Path(__file__).parent / "parity" / "tokenpacker.npz"

SMALL = {
    "tokenpacker": {"width": 32, "levels": 2, "out": 24},
    "c_abstractor": {"width": 16, "hidden": 16, "squeeze": 4, "patches": 36, "out": 12},
    "mqt": {"width": 32, "queries": 25, "out": 24},
}


def parts_of_sizes(name: str, sizes: dict[str, int]) -> Learned:
    """Untrained parts of a released model's sizes."""
    width, out = sizes["width"], sizes["out"]
    if name == "tokenpacker":
        return Packing(width, out, sizes["levels"] * width, 4)
    if name == "mqt":
        return Queries(width, out, sizes["queries"], 4, True)
    side = math.isqrt(sizes["patches"])
    return Abstractor(width, out, sizes["hidden"], 3, (side, side))


@every_method
@pytest.mark.parametrize("released", [True, False], ids=["released", "small"])
def test_names_and_shapes_are_those_of_released_files(name: str, released: bool):
    known = layout(name)
    sizes = dict(known.sizes) if released else SMALL[name]
    with torch.device("meta"):
        parts = parts_of_sizes(name, sizes)
    own = {known.prefix + key: tuple(t.shape) for key, t in parts.state_dict().items()}
    assert own == known.shapes(sizes)


@every_method
def test_released_files_load(name: str, tmp_path: Path):
    known, sizes = layout(name), SMALL[name]
    dtype = getattr(torch, known.dtype)
    generator = torch.Generator().manual_seed(3)
    held = {
        key: torch.randn(shape, generator=generator).to(dtype)
        for key, shape in known.shapes(sizes).items()
    }
    save_file({**held, "lm_head.weight": torch.ones(2)}, str(tmp_path / "model.safetensors"))
    parts = parts_of_sizes(name, sizes)
    load_released(parts, tmp_path)
    for key, value in parts.state_dict().items():
        assert torch.equal(value, held[known.prefix + key].float())
    save_file(
        {key: value for key, value in held.items() if not key.endswith("weight")},
        str(tmp_path / "model.safetensors"),
    )
    with pytest.raises(CheckpointError, match="lacks"):
        load_released(parts, tmp_path)


def test_a_released_tokenpacker_gives_the_original_numbers(tmp_path: Path):
    """A file of the released layout with the fixture's weights, loaded, against its output."""
    with np.load(FIXTURE) as data:
        weights = {
            key.removeprefix("in_w__").replace("__", "."): torch.from_numpy(data[key])
            for key in data.files
            if key.startswith("in_w__")
        }
        x, deep, want = (torch.from_numpy(data[k]) for k in ("in_x", "in_x_multi", "out_output"))
        heads, side = int(data["in_num_heads"]), int(data["in_raw_grid"])
        k = (side // int(data["in_scale_factor"])) ** 2
        atol = json.loads(str(data["meta"]))["atol"]
    sizes = {"width": x.shape[-1], "levels": deep.shape[-1] // x.shape[-1], "out": want.shape[-1]}
    known = layout("tokenpacker")
    named = {known.prefix + key: value for key, value in weights.items()}
    assert {key: tuple(value.shape) for key, value in named.items()} == known.shapes(sizes)
    save_file(named, str(tmp_path / "model.safetensors"))
    method = compressor("tokenpacker", head_width=sizes["width"] // heads)
    parts = method.parts(ConnectorShape(sizes["width"], sizes["out"], 2, (side, side), k))
    assert parts is not None
    load_released(parts, tmp_path)
    tokens = VisualTokens.from_features(
        x,
        segments=(Segment("image", (1, side, side), slice(0, side**2)),),
        evidence=Evidence(states=dict(enumerate(deep.chunk(2, -1)))),
    )
    made = method.compress(dataclasses.replace(tokens, parts=parts), k).features
    torch.testing.assert_close(made, want, atol=atol, rtol=1e-4)
