"""Images cut into tiles: budgets per tile or per image, newlines, and everything put together."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vlmcompress.core.config import CompressionConfig
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods import pipeline
from vlmcompress.methods.parts import Partition, in_parts
from vlmcompress.methods.stages import run_stages

# A whole view of 2 x 2, then a map of 2 x 4 from two tiles of 2 x 2, a newline after each row.
TILE = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, -1, 1, 1, 2, 2, -1])
SEGMENTS = (Segment("base", (1, 2, 2), slice(0, 4)), Segment("tile", (1, 2, 5), slice(4, 14)))
NEWLINES = [8, 13]


def image(b: int = 1, *, scores: list[float] | None = None) -> VisualTokens:
    """Units whose features spell out the row; [CLS] attention falls along the rows."""
    place = torch.arange(14.0).expand(b, 14)
    attention = torch.tensor(scores) if scores else torch.arange(14.0, 0, -1)
    rows = attention.expand(b, 1, 14).contiguous()
    return VisualTokens.from_features(
        place[..., None].repeat(1, 1, 3),
        segments=SEGMENTS,
        tile=TILE,
        evidence=Evidence(cls_attention=dict.fromkeys(range(4), rows)),
    )


def run(spec: str, group: VisualTokens, **options) -> list[VisualTokens]:
    stages = pipeline.build(spec, **options).stages
    return run_stages(stages, [group], 4)


def rows(spec: str, **options) -> list[int]:
    (out,) = run(spec, image(), **options)
    assert torch.equal(out.features[0, :, 0], out.index[0].float())
    number = {int(i): k for k, i in enumerate(out.index[0])}
    wanted = [number.get(i, -1) for i in range(14)]
    assert out.assignment is None or out.assignment[0].tolist() == wanted
    assert out.mass.tolist() == [[1.0] * out.n]
    return out.index[0].tolist()


def test_structural_rows_follow_the_tiles():
    tokens = image()
    assert tokens.structural.nonzero()[:, 0].tolist() == NEWLINES
    assert in_parts(tokens)
    assert not in_parts(VisualTokens.from_features(torch.zeros(1, 4, 2)))


def test_a_budget_per_tile():
    assert rows("fastervlm:2") == [0, 1, 4, 5, 6, 7]
    assert rows("fastervlm:0.25") == [0, 4, 6]


def test_a_budget_per_image():
    assert rows("fastervlm(scope='image'):0.25") == [0, 1, 2]
    assert rows("fastervlm(scope='image'):5") == [0, 1, 2, 3, 4]


def test_newlines_kept_stand_in_their_places():
    assert rows("fastervlm(newlines='kept'):0.25") == [0, 4, 6, 8, 13]
    assert rows("fastervlm(scope='image',newlines='kept'):1") == [0, 8, 13]


def test_newlines_as_candidates():
    scores = [0.0] * 8 + [9.0] + [0.0] * 4 + [8.0]
    (out,) = run("fastervlm(scope='image',newlines='candidates'):2", image(scores=scores))
    assert out.index.tolist() == [NEWLINES]


@pytest.mark.parametrize("method", ["uniform", "random", "pool", "fastervlm"])
@pytest.mark.parametrize("keep", ["1.0", "4"])
def test_keeping_every_part_keeps_newlines_and_all(method, keep):
    tokens = image()
    (out,) = run(f"{method}:{keep}", tokens)
    assert out is not None
    assert out.n == 14
    assert torch.equal(out.features, tokens.features)
    assert out.assignment is None


def test_grid_methods_see_the_rectangle_of_a_tile():
    (out,) = run("pool:1", image())
    assert out.features[0, :, 0].tolist() == [1.5, (4 + 5 + 9 + 10) / 4, (6 + 7 + 11 + 12) / 4]
    assert out.mass.tolist() == [[4, 4, 4]]
    assert out.assignment[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, -1, 1, 1, 2, 2, -1]


def test_a_second_stage_sees_what_the_first_left():
    (out,) = run("fastervlm:2 | fastervlm:1", image())
    assert out.index.tolist() == [[0, 4, 6]]
    wanted = torch.full((14,), -1)
    wanted[[0, 4, 6]] = torch.arange(3)
    assert torch.equal(out.assignment[0], wanted)


def test_images_of_a_batch_are_as_alone():
    tokens = image(3)
    scores = torch.rand(3, 1, 14, generator=torch.Generator().manual_seed(0))
    evidence = Evidence(cls_attention=dict.fromkeys(range(4), scores))
    tokens = dataclasses.replace(tokens, evidence=evidence)
    (together,) = run("fastervlm(newlines='kept'):2", tokens)
    for i in range(3):
        (alone,) = run("fastervlm(newlines='kept'):2", tokens.take_units(torch.tensor([i])))
        assert torch.equal(alone.index[0], together.index[i])
        assert torch.equal(alone.assignment[0], together.assignment[i])


def test_counts_of_their_own_per_image():
    """keep='auto' may leave another number of tokens in every part of every image."""
    flat, peaked = [1.0] * 14, [9.0, *[0.01] * 13]
    tokens = image(2)
    scores = torch.tensor([flat, peaked])[:, None]
    evidence = Evidence(cls_attention=dict.fromkeys(range(4), scores))
    groups = run("fastervlm:auto", dataclasses.replace(tokens, evidence=evidence))
    counts = {int(o): g.n for g in groups for o in g.owner}
    assert counts[0] > counts[1] >= 3


def test_gradients_reach_what_is_kept():
    tokens = image()
    features = tokens.features.clone().requires_grad_()
    (out,) = run("fastervlm(newlines='kept'):1", dataclasses.replace(tokens, features=features))
    out.features.sum().backward()
    assert features.grad[0, :, 0].nonzero()[:, 0].tolist() == [0, 4, 6, 8, 13]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scope": "batch"}, "allowed are tile, image, prompt"),
        ({"newlines": "lost"}, "allowed are kept, dropped, candidates"),
        ({"scope": "tile", "newlines": "candidates"}, "needs scope='image'"),
    ],
)
def test_bad_partitions_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        Partition(**options)


def test_options_travel_with_the_configuration():
    built = pipeline.build("fastervlm(scope='image',newlines='kept'):0.25")
    assert built.stages[0].partition == Partition("image", "kept")
    again = CompressionConfig.from_dict(built.config.to_dict())
    assert pipeline.build(again).stages[0].partition == Partition("image", "kept")
    assert CompressionConfig.from_spec(built.config.to_spec()) == built.config


def test_published_choices_are_the_defaults():
    assert pipeline.build("divprune:0.1").stages[0].partition == Partition("image", "candidates")
    assert pipeline.build("fastervlm:0.1").stages[0].partition == Partition("tile", "dropped")
