"""scope='prompt': one budget over the images of a row, shared by size before any pixel is seen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError, UnsupportedInputError
from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods import pipeline
from vlmcompress.methods.ops.shares import apportion
from vlmcompress.methods.stages import run_stages

DEPTH = 4


def images(n: int, owners: list[int], tile: Tensor | None = None, seed: int = 0) -> VisualTokens:
    """Images of n tokens."""
    generator = torch.Generator().manual_seed(seed + n)
    rows = torch.rand(len(owners), 1, n, generator=generator)
    return VisualTokens.from_features(
        torch.randn(len(owners), n, 4, generator=generator),
        segments=(Segment("image", (1, 1, n), slice(0, n)),),
        owner=torch.tensor(owners),
        tile=tile,
        evidence=Evidence(cls_attention=dict.fromkeys(range(DEPTH), rows)),
    )


#: Two prompts: images 0 (64 tokens), 1 (16) and 2 (20); images 3 (16) and 4 (64).
PROMPTS = [0, 0, 0, 1, 1]


def groups() -> list[VisualTokens]:
    return [images(64, [0, 4]), images(16, [1, 3]), images(20, [2])]


def run(spec: str, found: list[VisualTokens] | None = None) -> dict[int, VisualTokens]:
    """Every image's result, by its number."""
    stages = pipeline.build(spec).stages
    out = run_stages(stages, groups() if found is None else found, DEPTH, PROMPTS)
    return {
        int(owner): group.take_units(torch.tensor([i]))
        for group in out
        for i, owner in enumerate(group.owner.tolist())
    }


def counts(spec: str, found: list[VisualTokens] | None = None) -> list[int]:
    done = run(spec, found)
    return [done[owner].n for owner in sorted(done)]


METHODS = ["fastervlm", "random", "uniform", "divprune", "vtc_cls", "scope", "vispruner", "pitome"]


@pytest.mark.parametrize("method", METHODS)
def test_a_count_is_for_all_images_of_a_prompt(method: str):
    found = counts(f"{method}(scope='prompt'):10")
    assert found == [*apportion(10, [64, 16, 20], [64, 16, 20]), *apportion(10, [16, 64], [16, 64])]
    assert found == [6, 2, 2, 2, 8]


def test_a_fraction_is_of_all_tokens_of_a_prompt():
    # 0.07 of 100 tokens and of 80: 7 and 5.6; alone the images would keep 4, 1, 1, 1 and 4.
    assert counts("uniform(scope='prompt'):0.07") == [5, 1, 1, 1, 5]
    assert counts("uniform:0.07") == [4, 1, 1, 1, 4]
    assert counts("hired(scope='prompt'):0.07") == [5, 1, 1, 1, 4]  # int(80 * 0.07) is 5


def test_every_image_keeps_a_token():
    assert counts("uniform(scope='prompt'):0.001") == [1, 1, 1, 1, 1]
    assert counts("uniform(scope='prompt'):3") == [1, 1, 1, 1, 2]


def test_a_count_below_the_number_of_images_is_refused():
    with pytest.raises(UnsupportedInputError, match="3 images and keep=2"):
        run("uniform(scope='prompt'):2")


def test_keeping_all_touches_nothing():
    before = groups()
    stages = pipeline.build("vtc_cls(scope='prompt'):1.0").stages
    after = run_stages(stages, before, DEPTH, PROMPTS)
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_an_image_is_what_its_share_alone_makes_it(method: str):
    done = run(f"{method}(scope='prompt'):30")
    for group in groups():
        for i, owner in enumerate(group.owner.tolist()):
            share = done[owner].n
            (alone,) = run_stages(
                pipeline.build(f"{method}:{share}").stages,
                [group.take_units(torch.tensor([i]))],
                DEPTH,
            )
            assert torch.equal(alone.index, done[owner].index)
            torch.testing.assert_close(alone.features, done[owner].features, rtol=0, atol=1e-6)


def test_tiles_and_newlines_of_an_image_are_together():
    """20 tokens in a whole view and two tiles, and 4 newlines; its partner has 16 tokens."""
    tile = torch.tensor([0] * 8 + ([1] * 2 + [2] + [-1]) * 4)
    found = [images(24, [0], tile), images(16, [1])]
    assert counts("fastervlm(scope='prompt'):9", found) == [5, 4]  # of 20 and 16
    assert counts("fastervlm(scope='prompt',newlines='kept'):9", found) == [9, 4]
    assert counts("fastervlm(scope='prompt',newlines='candidates'):10", found) == [6, 4]
    best = found[0].evidence.cls_attention[2][0, 0].masked_fill(tile < 0, -1).topk(5).indices
    done = run("fastervlm(scope='prompt'):9", found)
    assert done[0].index[0].tolist() == sorted(best.tolist())


def test_a_second_stage_shares_what_the_first_left():
    assert counts("uniform:0.5 | vtc_cls(scope='prompt'):10") == [6, 2, 2, 2, 8]
    assert counts("vtc_cls(scope='prompt'):20 | uniform:1") == [1] * 5


def test_auto_has_no_budget_to_share():
    with pytest.raises(ConfigError, match="scope='prompt' shares one budget"):
        pipeline.build("vtc_cls(scope='prompt'):auto")


def test_outliers_are_those_of_each_image():
    found = groups()
    rows = {0: found[0].evidence.cls_attention[2].clone()}
    rows[0][:, :, 5] = 50.0
    evidence = Evidence(cls_attention=dict.fromkeys(range(DEPTH), rows[0]))
    found[0] = dataclasses.replace(found[0], evidence=evidence)
    done = run("fastervlm(scope='prompt', exclude_outliers='cls'):30", found)
    assert 5 not in done[0].index
    assert 5 not in done[4].index
    assert 5 in run("fastervlm(scope='prompt'):30", found)[0].index
