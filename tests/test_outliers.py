"""Outliers are told by a robust z-score and ranked after all others, whatever their scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from vlmcompress.core.config import CompressionConfig
from vlmcompress.core.errors import (
    ConfigError,
    ConfigTypeError,
    EvidenceError,
    UnsupportedInputError,
)
from vlmcompress.core.tokens import Evidence, VisualTokens
from vlmcompress.methods import pipeline, registry
from vlmcompress.methods.ops.topk import top_k
from vlmcompress.methods.outliers import Outliers, far_above
from vlmcompress.methods.stages import run_stages

DEPTH, N = 4, 40
#: Patches that attention likes best: three outliers, and the two best of the others.
LOUD, BEST = [3, 17, 30], [8, 21]


def image(b: int = 1, *, loud_norms: bool = True, tile: Tensor | None = None) -> VisualTokens:
    """Images whose outliers have the largest attention, and states ten times as long."""
    generator = torch.Generator().manual_seed(7)
    usual = torch.randn(b, 2, N, generator=generator).clamp(-1, 1)
    attention = 1e-3 * (0.5 * usual).exp()
    attention[..., BEST] = 2e-3
    attention[..., LOUD] = 0.2
    norms = 10 + torch.rand(b, N, generator=generator)
    if loud_norms:
        norms[:, LOUD] = 100
    rows = dict.fromkeys(range(DEPTH), attention)
    return VisualTokens.from_features(
        torch.arange(float(N)).view(1, N, 1).repeat(b, 1, 2),
        tile=tile,
        evidence=Evidence(cls_attention=rows, received_attention=rows, norms=norms),
    )


def run(spec: str, tokens: VisualTokens) -> list[VisualTokens]:
    return run_stages(pipeline.build(spec).stages, [tokens], DEPTH)


def kept(spec: str, tokens: VisualTokens | None = None) -> list[int]:
    (out,) = run(spec, image() if tokens is None else tokens)
    assert torch.equal(out.features[0, :, 0], out.index[0].float())
    return out.index[0].tolist()


SCORED = sorted(name for name in registry.BUILTIN if getattr(registry.get(name), "scored", False))


def test_the_methods_with_scores():
    assert SCORED == ["fastervlm", "hired", "received_attention", "vtc_cls"]


@pytest.mark.parametrize("kind", ["norm", "cls"])
@pytest.mark.parametrize("method", SCORED)
def test_outliers_come_after_all_others(method: str, kind: str):
    assert kept(f"{method}:3") == LOUD
    assert kept(f"{method}(exclude_outliers={kind!r}):2") == BEST
    assert kept(f"{method}(exclude_outliers=None):3") == LOUD
    # The count is exact also where only outliers are left, the best of them first.
    without = [i for i in range(N) if i not in LOUD]
    assert kept(f"{method}(exclude_outliers={kind!r}):{N - 3}") == without
    assert kept(f"{method}(exclude_outliers={kind!r}):{N - 1}") == sorted([*without, *LOUD[:2]])


def test_the_rest_is_ranked_as_ever():
    """What is left of the image without its outliers is what the method keeps of it."""
    tokens = image()
    others = torch.tensor([[i for i in range(N) if i not in LOUD]])
    alone = tokens.select(others)
    for k in range(1, N - 3):
        (out,) = run(f"vtc_cls:{k}", alone)
        assert kept(f"vtc_cls(exclude_outliers='norm'):{k}") == out.index[0].tolist()


def test_the_threshold():
    assert kept("fastervlm(exclude_outliers='norm', outlier_threshold=1000.0):3") == LOUD
    assert not set(kept("fastervlm(exclude_outliers='norm', outlier_threshold=100.0):9")) & {*LOUD}


def test_without_outliers_nothing_changes():
    tokens = image(loud_norms=False)
    assert kept("vtc_cls(exclude_outliers='norm'):3", tokens) == LOUD


def test_auto_counts_what_is_left():
    (out,) = run("fastervlm(exclude_outliers='norm'):auto(0.5)", image())
    assert not set(out.index[0].tolist()) & set(LOUD)
    (plain,) = run("fastervlm:auto(0.5)", image())
    assert plain.n < out.n


def test_a_batch_is_its_images_alone():
    tokens = image(3)
    generator = torch.Generator().manual_seed(1)
    norms = tokens.evidence.norms[:, torch.randperm(N, generator=generator)].clone()
    norms[1, :5] = 400
    evidence = dataclasses.replace(tokens.evidence, norms=norms)
    tokens = dataclasses.replace(tokens, evidence=evidence)
    (together,) = run("vtc_cls(exclude_outliers='norm'):9", tokens)
    for i in range(3):
        (alone,) = run("vtc_cls(exclude_outliers='norm'):9", tokens.take_units(torch.tensor([i])))
        assert torch.equal(alone.index[0], together.index[i])


def test_every_view_has_its_own():
    """One long state among short ones is an outlier of its view and not of the image."""
    tile = torch.arange(2).repeat_interleave(N // 2)
    tokens = image(tile=tile)
    norms = torch.cat([torch.full((20,), 1.0), torch.full((20,), 50.0)])[None]
    norms = norms + torch.rand(1, N, generator=torch.Generator().manual_seed(0)) / 9
    norms[0, 3] = 50
    evidence = dataclasses.replace(tokens.evidence, norms=norms)
    tokens = dataclasses.replace(tokens, evidence=evidence)
    assert kept("fastervlm(exclude_outliers='norm'):2", tokens) == [8, 17, 21, 30]
    assert kept("fastervlm(exclude_outliers='norm', scope='image'):3", tokens) == LOUD


def test_hired_leaves_them_in_every_view():
    line = torch.arange(1, 3).repeat_interleave(4)
    tokens = image(tile=torch.cat([torch.zeros(16, dtype=torch.long), line.repeat(3)]))
    assert set(kept("hired:6", tokens)) > set(LOUD)
    left = kept("hired(exclude_outliers='norm'):6", tokens)
    assert len(left) == 6
    assert not set(left) & set(LOUD)


def test_newlines_are_neither_outliers_nor_counted():
    tile = torch.zeros(N, dtype=torch.long)
    tile[25:] = -1
    tokens = image(tile=tile)
    norms = tokens.evidence.norms.clone()
    norms[:, 25:] = 0
    tokens = dataclasses.replace(tokens, evidence=dataclasses.replace(tokens.evidence, norms=norms))
    marked = Outliers("norm").marked(tokens, {})
    assert marked.evidence.outliers.nonzero()[:, 1].tolist() == [3, 17]


def test_a_second_stage_looks_again():
    out = kept("fastervlm:30 | vtc_cls(exclude_outliers='norm'):2")
    assert out == BEST


# --- the z-score --------------------------------------------------------------------------------


def test_far_above_by_definition():
    values = torch.randn(5, 101, generator=torch.Generator().manual_seed(2)) ** 3
    middle = values.median(1, keepdim=True).values
    deviation = (values - middle).abs().median(1, keepdim=True).values
    z = 0.6744897501960817 * (values - middle) / deviation
    for threshold in (0.5, 2.0, 3.5, 7.0):
        assert torch.equal(far_above(values, threshold), z > threshold)


def test_rounding_makes_no_outlier():
    values = torch.full((1, 50), 30.0)
    values[0, 7] = values[0, 7].nextafter(torch.tensor(99.0))
    assert not far_above(values, 3.5).any()
    values[0, 9] = 30.1
    assert far_above(values, 3.5).nonzero()[:, 1].tolist() == [9]


@pytest.mark.parametrize("k", [1, 4, 7, 10])
def test_top_k_with_rows_that_come_last(k: int):
    scores = torch.tensor([[5.0, 9, 1, 9, 3, 7, 2, 8, 6, 4]])
    last = torch.tensor([[0, 1, 0, 1, 0, 0, 1, 0, 0, 0]]).bool()
    order = [7, 5, 8, 0, 9, 4, 2, 1, 3, 6]
    assert top_k(scores, k, last)[0].tolist() == sorted(order[:k])


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("fastervlm(exclude_outliers='loud'):3", ConfigError, "allowed are 'norm', 'cls' and None"),
        ("fastervlm(exclude_outliers=True):3", ConfigError, "exclude_outliers is True"),
        ("fastervlm(outlier_threshold='high'):3", ConfigTypeError, "must be a number"),
        ("fastervlm(outlier_threshold=-1):3", ConfigError, "must be finite"),
        ("divprune(exclude_outliers='norm'):3", ConfigError, "'divprune' ranks none"),
        ("evit(exclude_outliers='norm'):3", ConfigError, "no option exclude_outliers"),
    ],
)
def test_options_that_make_no_sense(spec: str, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        pipeline.build(spec)


@pytest.mark.parametrize("kind", ["norm", "cls"])
def test_what_they_are_told_by_must_be_there(kind: str):
    tokens = VisualTokens.from_features(torch.zeros(1, 5, 2))
    with pytest.raises(EvidenceError, match="exclude_outliers"):
        Outliers(kind).marked(tokens, {})


def test_lengths_that_are_no_numbers_are_refused():
    tokens = image()
    norms = tokens.evidence.norms.clone()
    norms[0, 4] = torch.nan
    evidence = dataclasses.replace(tokens.evidence, norms=norms)
    with pytest.raises(UnsupportedInputError, match="states hold NaN"):
        run("fastervlm(exclude_outliers='norm'):3", dataclasses.replace(tokens, evidence=evidence))


def test_they_travel_with_the_configuration():
    spec = "vtc_cls(exclude_outliers='cls', outlier_threshold=2.5):0.25"
    built = pipeline.build(spec)
    assert built.stages[0].outliers == Outliers("cls", 2.5)
    again = CompressionConfig.from_dict(built.config.to_dict())
    assert pipeline.build(again).stages[0].outliers == Outliers("cls", 2.5)
    assert built.config.to_spec() == spec
