"""What every trained compressor between tower and LLM promises, on tensors alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compressors import (
    KINDS,
    OPTIONS,
    OUT,
    SIZES,
    compressor,
    every_method,
    every_size,
    images,
    setting,
    shape_for,
    trained,
)
from vlmcompress.core.errors import (
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    EvidenceError,
)
from vlmcompress.core.tokens import Segment
from vlmcompress.methods import create
from vlmcompress.methods.trained import LearnedCompressor


@every_method
@every_size
def test_counts_and_what_rows_stand_for(name: str, size: tuple[int, int]):
    method, tokens = setting(name, size)
    for keep in (1, 2, 5, 7, 8, tokens.n - 1, tokens.n, 900, 0.1, 0.5, 1.0):
        made = method.compress(tokens, keep)
        k = method.tokens_kept(tokens.segments, keep)
        assert made.features.shape == (3, k, OUT)
        assert bool(made.features.isfinite().all())
        assert 1 <= k <= tokens.n
        assert bool((made.index.diff(dim=1) > 0).all())
        assert made.assignment is not None
        assert sorted(set(made.assignment[0].tolist())) == list(range(k))
        assert torch.equal(made.assignment.gather(1, made.index), torch.arange(k).expand(3, -1))
        assert torch.equal(made.mass.sum(1), torch.full((3,), float(tokens.n)))


def test_counts_are_those_asked_for_where_a_grid_has_them():
    mqt, packer = compressor("mqt"), compressor("tokenpacker")

    def kept(method: LearnedCompressor, grid: tuple[int, int, int], k: int) -> int:
        segments = (Segment("image", grid, slice(0, math.prod(grid))),)
        return method.tokens_kept(segments, k)

    assert [kept(mqt, (1, 14, 14), k) for k in (1, 7, 25, 26, 196)] == [1, 7, 25, 25, 25]
    assert [kept(packer, (1, 14, 14), k) for k in (1, 2, 4, 8, 9, 12, 49)] == [
        1,
        2,
        4,
        8,
        9,
        12,
        49,
    ]
    assert [kept(packer, (1, 24, 24), k) for k in (144, 64, 36)] == [144, 64, 36]
    assert kept(packer, (1, 14, 14), 7) == 6
    assert kept(packer, (4, 6, 6), 16) == 16


@every_method
@every_size
def test_a_batch_is_its_images_alone(name: str, size: tuple[int, int]):
    method, tokens = setting(name, size)
    together = method.compress(tokens, 8)
    for i in range(3):
        alone = method.compress(tokens.take_units(torch.tensor([i])), 8)
        torch.testing.assert_close(alone.features[0], together.features[i])
        assert alone.assignment is not None
        assert together.assignment is not None
        assert torch.equal(alone.assignment[0], together.assignment[i])


@every_method
@pytest.mark.parametrize("keep", [1, 6, 20])
def test_gradients_reach_all_parts_and_the_tower(name: str, keep: int):
    method, tokens = setting(name, (6, 6))
    read = [tokens.features, *tokens.evidence.states.values()]
    for states in read:
        states.requires_grad_()
    made = method.compress(tokens, keep)
    made.features.square().sum().backward()
    assert tokens.parts is not None
    for label, parameter in tokens.parts.named_parameters():
        assert parameter.grad is not None, label
        assert bool(parameter.grad.isfinite().all())
        assert bool(parameter.grad.ne(0).any()), label
    for states in read:
        assert states.grad is not None
        assert bool(states.grad.ne(0).any())


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_in_is_dtype_out_and_the_work_is_done_in_float32(name: str, dtype: torch.dtype):
    method, tokens = setting(name, (5, 7))
    half = dataclasses.replace(
        tokens,
        features=tokens.features.to(dtype),
        evidence=tokens.evidence._map(lambda states: states.to(dtype)),
    )
    rounded = dataclasses.replace(
        half,
        features=half.features.float(),
        evidence=half.evidence._map(lambda states: states.float()),
    )
    made = method.compress(half, 8).features
    assert made.dtype == dtype
    want = method.compress(rounded, 8).features
    torch.testing.assert_close(made, want.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.compress(half, 8).features, made)


@every_method
def test_parts_are_saved_and_loaded(name: str, tmp_path: Path):
    method, tokens = setting(name, (6, 6))
    path = tmp_path / "parts.safetensors"
    assert tokens.parts is not None
    tokens.parts.save(path)
    loaded = compressor(name, weights=str(path)).parts(shape_for(method))
    assert loaded is not None
    assert loaded.config == tokens.parts.config
    again = method.compress(dataclasses.replace(tokens, parts=loaded), 8)
    assert torch.equal(again.features, method.compress(tokens, 8).features)


CHANGES: dict[str, list[tuple[dict[str, Any], dict[str, Any], str]]] = {
    "tokenpacker": [
        ({"head_width": 4}, {}, "heads 2 instead of 4"),
        ({}, {"width": 24}, "width 16 instead of 24"),
        ({}, {"out": 8}, "out 12 instead of 8"),
        ({"layers": (1,)}, {"levels": 1}, "deep 32 instead of 16"),
        ({"layers": (1, -1)}, {}, r"layers \[0.5, -1\] instead of \[1, -1\]"),
        ({}, {"state_width": 20}, "deep 32 instead of 40"),
    ],
    "c_abstractor": [
        ({"depth": 1}, {}, "depth 2 instead of 1"),
        ({"hidden": None}, {}, "hidden 20 instead of 16"),
        ({}, {"grid": (6, 5)}, r"grid \[6, 6\] instead of \[6, 5\]"),
        ({"table": 9}, {"grid": None}, r"grid \[6, 6\] instead of \[9, 9\]"),
    ],
    "mqt": [
        ({"max_tokens": 16}, {}, "max_tokens 25 instead of 16"),
        ({"faithful": True}, {}, "keys 'content' instead of 'positions'"),
        ({"head_width": 16}, {}, "heads 4 instead of 1"),
    ],
}


@every_method
def test_files_for_something_else_are_refused(name: str, tmp_path: Path):
    method, path = compressor(name), tmp_path / "parts.safetensors"
    trained(method).save(path)
    for options, shape, message in CHANGES[name]:
        other = compressor(name, **options, weights=str(path))
        with pytest.raises(ConfigError, match=f"made for.*{message}"):
            other.parts(shape_for(method, **shape))
    for stranger in OPTIONS.keys() - {name}:
        other = compressor(stranger, weights=str(path))
        with pytest.raises(ConfigError, match=f"method '{name}' instead of '{stranger}'"):
            other.parts(shape_for(other))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="no usable weights"):
        compressor(name, weights=str(path)).parts(shape_for(method))


@every_method
def test_weights_fit_every_count_and_size(name: str):
    """What differs between counts is not what is learned, so that `keep` may vary in training."""
    method = compressor(name)
    parts = method.parts(shape_for(method))
    other = method.parts(shape_for(method, tokens=1))
    assert parts is not None
    assert other is not None
    assert parts.config == other.config
    for size in SIZES:
        for keep in (1, 4):
            made = method.compress(images(method, size, parts), keep)
            assert made.features.shape[1] == method.tokens_kept(made.segments, keep)


@every_method
def test_equal_seeds_make_equal_parts(name: str):
    state = torch.get_rng_state()
    first, again, other = (
        compressor(name, seed=seed).parts(shape_for(compressor(name))) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first is not None
    assert again is not None
    assert other is not None
    mine, same, strange = first.state_dict(), again.state_dict(), other.state_dict()
    assert all(torch.equal(mine[key], same[key]) for key in mine)
    assert any(not torch.equal(mine[key], strange[key]) for key in mine)


@every_method
def test_what_cannot_be_compressed(name: str):
    method, tokens = setting(name, (6, 6))
    with pytest.raises(EvidenceError, match=f"trained parts .{KINDS[name].__name__}"):
        method.compress(dataclasses.replace(tokens, parts=None), 4)
    thinned = tokens.select(torch.arange(20).expand(3, -1))
    with pytest.raises(ConfigError, match=f"put {name} first"):
        method.compress(thinned, 4)
    halves = tuple(Segment("tile", (1, 3, 6), slice(i, i + 18)) for i in (0, 18))
    with pytest.raises(ConfigError, match=f"{name} works on one rectangle"):
        method.compress(dataclasses.replace(tokens, segments=halves), 4)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("tokenpacker", {"layers": (1.5,)}, "share of depth"),
        ("tokenpacker", {"head_width": 0}, "head_width is 0"),
        ("tokenpacker", {"tokens": 0}, "tokens is 0"),
        ("c_abstractor", {"depth": 0}, "depth is 0"),
        ("c_abstractor", {"hidden": 0}, "hidden is 0"),
        ("c_abstractor", {"table": 0}, "table is 0"),
        ("mqt", {"max_tokens": 8}, "square number, such as 4"),
        ("mqt", {"max_tokens": 16, "tokens": 17}, "there are 16 queries"),
        ("mqt", {"faithful": 1}, "True or False"),
        ("mqt", {"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], match: str):
    with pytest.raises((ConfigError, ConfigTypeError), match=match):
        create(name, **options)
