"""Towers alone: what the ideal runs, and what is told of a method inside a tower."""

from __future__ import annotations

import json

import pytest
import torch

from eval_harness import shapes, towers
from eval_harness.towers import bench_tower
from vlmcompress.core.errors import ConfigError, UnsupportedModelError
from vlmcompress.families.bare import bare_family_of
from vlmcompress.reference.weights import load_text_head


@pytest.fixture(scope="module")
def tower():
    return shapes.build_tower("tiny")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def results(tower, pixels):
    return bench_tower(tower, pixels, [("none", None), ("tome_tower", 0.5)], repeats=2, warmup=0)


def test_rows_of_a_configuration(results):
    none, merged = results["configs"]
    assert none["patches"] == [36] * 6
    assert merged["patches"][-1] == 18
    assert merged["flops"]["after"] < merged["flops"]["before"]
    for row in (none, merged):
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"]["mean"])
        assert row["speedup"] > 0
        assert row["ideal_ratio"] > 0
    assert json.loads(json.dumps(results)) == results
    assert results["machine"]["shape"] == "tiny"
    assert results["image_size"] == [48, 48]


def test_blocks_alone_make_what_the_tower_makes(tower, pixels):
    family = bare_family_of(tower)
    blocks = towers._Blocks(tower, family.own_tower, family, pixels)
    assert (len(blocks), blocks.rows, blocks.extra) == (6, 37, 1)
    seen = []
    layers = family.own_tower.layers(tower.get_submodule(family.tower_path))
    hooks = [
        layer.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
        for layer in layers
    ]
    blocks.run([37, 30, 30, 20, 10, 5])
    for hook in hooks:
        hook.remove()
    assert seen == [37, 30, 30, 20, 10, 5]


@pytest.mark.parametrize(("method", "first"), [("tome_tower", 34), ("evit", 37)])
def test_the_ideal_begins_with_what_a_method_leaves(tower, pixels, method, first):
    side = towers._Side(tower, pixels, None, None, method, 0.5)
    after = [33, 30, 27, 24, 21, 18] if method == "tome_tower" else [36, 36, 29, 23, 18, 18]
    rows = side._rows(after, 36, 1)
    assert rows[0] == first
    assert rows[-1] == 19


def test_the_tower_of_a_checkpoint():
    taken, pixels = towers.subject("reference", False, torch.float32, torch.device("cpu"))
    assert taken.config.model_type == "clip_vision_model"
    assert pixels.shape[-1] == taken.config.image_size


def test_what_is_no_tower(pixels):
    with pytest.raises(UnsupportedModelError, match="stands alone"):
        bench_tower(shapes.build("tiny"), pixels, [("tome_tower", 0.5)])
    with pytest.raises(ConfigError, match="repeats"):
        bench_tower(load_text_head(), pixels, [("tome_tower", 0.5)], repeats=0)
