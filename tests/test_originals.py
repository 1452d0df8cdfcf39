"""Where released code fails or loses tokens: what this library does (docs/originals.md)."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.units import DEPTH, covering_by_definition, make, segments_of, tokens_for
from vlmcompress.core.errors import ConfigError, ConfigTypeError, MissingTextError
from vlmcompress.core.tokens import Evidence, VisualTokens
from vlmcompress.methods import create, pipeline, registry
from vlmcompress.methods.base import AdaptiveCompressor
from vlmcompress.methods.connector.scope import Scope
from vlmcompress.methods.ops import merging
from vlmcompress.methods.ops.diversity import cosine, covering, determinantal, thin_out
from vlmcompress.methods.stages import run_stages


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_rows(features: Tensor, attention: Tensor) -> VisualTokens:
    """Features with one [CLS] row ([b, n])."""
    evidence = Evidence(cls_attention={22: attention[:, None]})
    return VisualTokens.from_features(features, evidence=evidence)


def test_every_line_of_the_page_names_its_tests():
    page = (Path(__file__).parents[1] / "docs" / "originals.md").read_text()
    written = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    for row in rows:
        tests = re.findall(r"`(test_\w+)`", row) or re.findall("parity", row)
        assert tests, row
        assert all(name == "parity" or f"def {name}(" in written for name in tests), row
        assert set(re.findall(r"`(\w+)`", row.split("|")[1])) <= set(registry.BUILTIN)


# --- VisionZip ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "contextual"), [(64, 10), (128, 20), (192, 30), (1, 0), (2, 0)])
def test_visionzip_splits_its_budget_as_published(k: int, contextual: int):
    assert create("visionzip")._contextual(k) == contextual  # type: ignore[attr-defined]


@pytest.mark.parametrize("contextual", [0, 0.0])
def test_visionzip_without_contextual_tokens_is_fastervlm(contextual: float):
    method = make("visionzip", {"contextual": contextual})
    tokens = tokens_for(method, [(1, 6, 6)])
    kept = method.compress(tokens, 7)
    alone = tokens.select(make("fastervlm", {}).compress(tokens, 7).index)
    assert torch.equal(kept.index, alone.index)
    assert torch.equal(kept.features, alone.features)
    assert (kept.mass == 1).all()


@pytest.mark.parametrize("contextual", [5, 9])
def test_visionzip_needs_a_dominant_token(contextual: int):
    method = make("visionzip", {"contextual": contextual})
    tokens = tokens_for(method, [(1, 6, 6)])
    with pytest.raises(ConfigError, match="a dominant token is left"):
        method.compress(tokens, 5)
    with pytest.raises(ConfigError, match="a dominant token is left"):
        method.tokens_kept(tokens.segments, 5)


def test_visionzip_sums_or_averages():
    method = make("visionzip", {"contextual": 3})
    tokens = tokens_for(method, [(1, 6, 6)])
    summed = method.compress(tokens, 9)
    mean = make("visionzip", {"contextual": 3, "average": True}).compress(tokens, 9)
    assert torch.equal(summed.index, mean.index)
    assert torch.equal(summed.mass, mean.mass)
    assert summed.mass.sum(1).tolist() == [36, 36]
    for b, row in zip(*(summed.mass > 1).nonzero(as_tuple=True), strict=True):
        group = tokens.features[b, summed.assignment[b] == row]  # type: ignore[index]
        own = tokens.features[b, summed.index[b, row]]
        others = (group.sum(0) - own) / (len(group) - 1)
        torch.testing.assert_close(summed.features[b, row], own + others)
        torch.testing.assert_close(mean.features[b, row], group.mean(0))


def test_visionzip_carries_cls_in_the_place_of_a_token_that_is_merged_away():
    method = make("visionzip", {"contextual": 3, "faithful": True})
    tokens = tokens_for(method, [(1, 6, 6)])
    kept = method.compress(tokens, 9)
    assert torch.equal(kept.features[:, 0], tokens.evidence.cls_features)
    assert kept.mass[:, 0].tolist() == [0, 0]
    assert kept.mass.sum(1).tolist() == [36, 36]
    assert all(len(set(row.tolist())) == 9 for row in kept.index)
    assert not method.raster_order


@pytest.mark.parametrize("options", [{}, {"contextual": 1}])
def test_visionzip_with_the_fewest_tokens_when_faithful(options: dict[str, int]):
    """[CLS] takes the place of the only dominant token."""
    k = 1 + options.get("contextual", 0)
    method = make("visionzip", {"faithful": True, **options})
    tokens = tokens_for(method, [(1, 6, 6)])
    kept = method.compress(tokens, k)
    assert kept.n == k
    assert torch.equal(kept.features[:, 0], tokens.evidence.cls_features)
    assert kept.mass.sum(1).tolist() == [36 * (k - 1)] * 2


def test_visionzip_packs_tiles_as_released_when_faithful():
    """The whole view, dominant tokens of all tiles by place, [CLS] rows, contextual tokens."""
    method = make("visionzip", {"contextual": 2, "faithful": True})
    line = torch.arange(1, 3).repeat_interleave(3)
    tile = torch.cat([torch.zeros(9, dtype=torch.long), line.repeat(3)])
    tokens = dataclasses.replace(tokens_for(method, [(1, 3, 3), (1, 3, 6)]), tile=tile)
    stages = pipeline.build("visionzip(contextual=2, faithful=True):5").stages
    (out,) = run_stages(stages, [tokens], DEPTH)
    views = []
    for view in range(3):
        columns = (tile == view).nonzero()[:, 0]
        part = VisualTokens.from_features(
            tokens.features[:, columns], evidence=tokens.evidence.select(columns.expand(2, -1))
        )
        kept = method.compress(part, 5)
        views.append((columns[kept.index], kept.features))
    for b in range(2):
        whole, left, right = ((index[b], features[b]) for index, features in views)
        dominant = torch.cat([left[0][1:3], right[0][1:3]])
        order = dominant.argsort()
        rows = [whole[0], dominant[order]]
        rows += [left[0][:1], right[0][:1], left[0][3:], right[0][3:]]
        assert torch.equal(out.index[b], torch.cat(rows))
        features = [whole[1], torch.cat([left[1][1:3], right[1][1:3]])[order]]
        features += [left[1][:1], right[1][:1], left[1][3:], right[1][3:]]
        assert torch.equal(out.features[b], torch.cat(features))
        assert (out.mass[b] == 0).nonzero()[:, 0].tolist() == [0, 9, 10]
        assert out.mass[b].sum() == 27


# --- PruMerge and PruMerge+ ----------------------------------------------------------------------


def flat(method: str, **options: object) -> tuple[AdaptiveCompressor, VisualTokens]:
    """A method on an image whose attention has no outlier."""
    built = create(method, **options)
    assert isinstance(built, AdaptiveCompressor)
    tokens = tokens_for(built, [(1, 6, 6)], b=1)
    wide = {
        layer: torch.full_like(v, 1 / 40) for layer, v in tokens.evidence.wide_cls_attention.items()
    }
    return built, dataclasses.replace(
        tokens, evidence=dataclasses.replace(tokens.evidence, wide_cls_attention=wide)
    )


def test_prumerge_without_outliers_leaves_one_token():
    method, tokens = flat("prumerge")
    assert method.counts(tokens) == [1]
    kept = method.adapt(tokens)
    torch.testing.assert_close(kept.features[:, 0], tokens.features.sum(1) / 40)
    assert kept.mass.tolist() == [[36]]


def test_prumerge_plus_without_outliers_does_not_divide_by_zero():
    method, tokens = flat("prumerge_plus")
    # One token by attention, and every twelfth of the grid: 0, 12, 24.
    assert method.counts(tokens) == [4]
    assert method.adapt(tokens).index[0].tolist()[:1] == [0]


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("k", [1, 2, 3, 17, 35, 36])
def test_prumerge_keeps_exactly_what_is_asked(name: str, k: int):
    method = make(name, {})
    kept = method.compress(tokens_for(method, [(1, 6, 6)]), k)
    assert kept.n == k
    assert kept.mass.sum(1).tolist() == [36, 36]


def test_prumerge_decides_for_each_image_unless_faithful():
    method = make("prumerge", {})
    tokens = tokens_for(method, [(1, 8, 8)])
    row = rand(2, 64) / 64
    row[0, :9] = 1.0
    tokens = dataclasses.replace(
        tokens,
        evidence=dataclasses.replace(tokens.evidence, wide_cls_attention={11: row[:, None]}),
    )
    released = create("prumerge", faithful=True)
    assert isinstance(method, AdaptiveCompressor)
    assert isinstance(released, AdaptiveCompressor)
    assert method.counts(tokens) == [10, 1]
    assert len(set(released.counts(tokens))) == 1


@pytest.mark.parametrize(("keep", "k"), [(0.125, 73), (0.5, 289), (12, 12), (1.0, 576)])
def test_prumerge_counts_as_released_when_faithful(keep: float | int, k: int):
    segments = segments_of([(1, 24, 24)])
    assert make("prumerge", {"faithful": True}).tokens_kept(segments, keep) == k


def test_prumerge_plus_grid_reaches_the_last_token_unless_faithful():
    counts = []
    for faithful in (False, True):
        method = create("prumerge_plus", top=1, stride=5, faithful=faithful)
        assert isinstance(method, AdaptiveCompressor)
        tokens = tokens_for(method, [(1, 6, 6)], b=1)
        row = torch.zeros(1, 1, 36)
        row[..., 0] = 1
        tokens = dataclasses.replace(
            tokens, evidence=dataclasses.replace(tokens.evidence, wide_cls_attention={11: row})
        )
        counts += method.counts(tokens)
    assert counts == [9, 8]  # 0, 5, ..., 35 and the rest


def test_prumerge_plus_options():
    with pytest.raises(ConfigError, match="give both"):
        create("prumerge_plus", top=3)
    with pytest.raises(ConfigError, match="at least 1"):
        create("prumerge_plus", top=3, stride=0)


# --- VisPruner -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 57, 58, 59, 144, 575])
@pytest.mark.parametrize("important", [0.0, 0.5, 1.0])
def test_vispruner_takes_odd_rounds(k: int, important: float):
    """58 of 576 with half important leaves 547 others, where the original stops with an error."""
    tokens = with_rows(randn(2, 576, 8), rand(2, 576, seed=1))
    kept = make("vispruner", {"important": important}).compress(tokens, k).index
    assert kept.shape == (2, k)
    assert (kept.diff(dim=1) > 0).all()


def test_thinning_drops_duplicates_first():
    features = torch.eye(6).repeat(2, 1)[None]
    order = torch.arange(12)[None]
    left = thin_out(cosine(features), order[:, [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]], 6)
    assert sorted((left % 6)[0].tolist()) == [0, 1, 2, 3, 4, 5]


# --- CDPruner ------------------------------------------------------------------------------------


def about(features: Tensor, patches: Tensor, text: Tensor) -> VisualTokens:
    evidence = Evidence(text=text, patches=patches)
    return VisualTokens.from_features(features, evidence=evidence)


@pytest.mark.parametrize("distinct", [1, 3, 12])
def test_cdpruner_beyond_the_kernels_rank_repeats_nothing(distinct: int):
    features = randn(2, distinct, 3).repeat(1, 48 // distinct, 1)
    tokens = about(features, randn(2, 48, 5, seed=1), randn(2, 1, 5, seed=2))
    kept = make("cdpruner", {}).compress(tokens, 40).index
    assert (kept.diff(dim=1) > 0).all()


def test_cdpruner_fills_up_by_relevance():
    features = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0], [0, 1]])[None]
    relevance = torch.tensor([[0.9, 0.8, 0.2, 0.7, 0.5]])
    kernel = cosine(features) * relevance[..., None] * relevance[:, None]
    assert determinantal(kernel, relevance, 5)[0].tolist() == [0, 1, 3, 4, 2]


def test_cdpruner_scales_each_image_alone_unless_faithful():
    patches = torch.cat([randn(1, 30, 5), 1 + 0.01 * randn(1, 30, 5)])
    tokens = about(randn(2, 30, 16), patches, randn(1, 1, 5, seed=3).expand(2, -1, -1))
    alone, together = create("cdpruner"), create("cdpruner", faithful=True)
    spread = [m.relevance(tokens).amin(1) for m in (alone, together)]  # type: ignore[attr-defined]
    assert spread[0].max() < 1e-3
    assert spread[1].max() > 1e-3


def test_cdpruner_where_nothing_tells_tokens_apart():
    tokens = about(torch.ones(1, 9, 4), torch.ones(1, 9, 5), torch.ones(1, 1, 5))
    assert make("cdpruner", {}).compress(tokens, 4).index[0].tolist() == [0, 1, 2, 3]


def test_cdpruner_parts_that_fill_up_do_not_count():
    text = randn(1, 2, 5, seed=3)
    padded = torch.cat([text, torch.zeros(1, 3, 5)], 1)
    method = create("cdpruner")
    tokens = [about(randn(1, 20, 8), randn(1, 20, 5), t) for t in (text, padded)]
    a, b = (method.relevance(t) for t in tokens)  # type: ignore[attr-defined]
    torch.testing.assert_close(a, b)


def test_cdpruner_without_a_question():
    with pytest.raises(MissingTextError, match="question"):
        make("cdpruner", {}).compress(VisualTokens.from_features(randn(1, 9, 4)), 3)


# --- SCOPE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_coverage_is_that_of_the_definition(seed: int):
    similarity, weights = cosine(randn(3, 40, 6, seed=seed)), rand(3, 40, seed=seed + 1)
    got = covering(similarity, weights, 20)
    for unit in range(3):
        want = covering_by_definition(similarity[unit].double(), weights[unit].double(), 20)
        assert got[unit].tolist() == want


def test_scope_never_repeats():
    tokens = with_rows(torch.ones(1, 12, 3), torch.zeros(1, 12))
    method = make("scope", {})
    assert isinstance(method, Scope)
    assert method.order(tokens, 12).sort(1).values[0].tolist() == list(range(12))


# --- HoloV ---------------------------------------------------------------------------------------


def test_holov_gives_the_surplus_of_a_full_run_to_the_next():
    attention = torch.full((1, 32), 1e-3)
    attention[:, 8:16] = 1.0
    tokens = with_rows(randn(1, 32, 4), attention)
    kept = make("holov", {"crops": 4}).compress(tokens, 20)
    # The original fills the 12 rows beyond the second run's length with zeros.
    assert set(range(8, 16)) <= set(kept.index[0].tolist())
    assert len(set(kept.index[0].tolist())) == 20


@pytest.mark.parametrize("crops", [1, 5, 16, 400])
@pytest.mark.parametrize("k", [1, 7, 24])
def test_holov_takes_any_number_of_runs(crops: int, k: int):
    tokens = with_rows(randn(2, 25, 4), rand(2, 25))
    assert make("holov", {"crops": crops}).compress(tokens, k).n == k


# --- VScan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 31, 64, 100, 575])
def test_vscan_keeps_exactly_what_is_asked(k: int):
    method = make("vscan", {})
    tokens = tokens_for(method, [(1, 24, 24)])
    kept = method.compress(tokens, k)
    assert kept.n == k
    assert kept.mass.sum(1).tolist() == [576, 576]


@pytest.mark.parametrize(("name", "k"), [("vscan", 45), ("prumerge", 58)])
def test_documented_counts_of_released_code(name: str, k: int):
    segments = segments_of([(1, 24, 24)])
    assert make(name, {"faithful": True}).tokens_kept(segments, 0.1) == k
    assert make(name, {}).tokens_kept(segments, 0.1) == 58


@pytest.mark.parametrize(("k", "left"), [(100, 98), (64, 64), (31, 16), (1, 1)])
def test_vscan_rounds_down_as_released_when_faithful(k: int, left: int):
    method = make("vscan", {"faithful": True})
    tokens = tokens_for(method, [(1, 24, 24)])
    assert method.tokens_kept(tokens.segments, k) == left
    assert method.compress(tokens, k).n == left


def test_vscan_that_would_keep_nothing():
    method = make("vscan", {"faithful": True, "local": 1.0})
    with pytest.raises(ConfigError, match="keeps none"):
        method.tokens_kept(segments_of([(1, 24, 24)]), 5)


@pytest.mark.parametrize("grid", [(1, 7, 10), (2, 5, 4), (1, 1, 13)])
def test_vscan_on_grids_that_windows_do_not_divide(grid: tuple[int, int, int]):
    method = make("vscan", {"window": 3})
    tokens = tokens_for(method, [grid])
    k = math.prod(grid) // 2
    assert method.compress(tokens, k).n == k


def test_vscan_averages_groups():
    method = make("vscan", {"window": 3})
    tokens = tokens_for(method, [(1, 6, 6)])
    kept = method.compress(tokens, 8)
    for row in range(8):
        group = tokens.features[0, kept.assignment[0] == row]  # type: ignore[index]
        torch.testing.assert_close(kept.features[0, row], group.mean(0))


# --- ToMe and PiToMe -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tome", "pitome"])
@pytest.mark.parametrize("metric", ["keys", "features"])
@pytest.mark.parametrize("k", [1, 2, 9, 18, 35])
def test_merging_reaches_any_count_and_keeps_the_mean(name: str, metric: str, k: int):
    method = make(name, {"metric": metric})
    tokens = tokens_for(method, [(1, 6, 6)])
    kept = method.compress(tokens, k)
    assert kept.n == k
    assert kept.mass.sum(1).tolist() == [36, 36]
    weighted = (kept.features * kept.mass[..., None]).sum(1) / 36
    torch.testing.assert_close(weighted, tokens.features.mean(1))


@pytest.mark.parametrize("name", ["tome", "pitome"])
def test_released_order_holds_the_same_tokens_after_one_round(name: str):
    plain = make(name, {})
    tokens = tokens_for(plain, [(1, 6, 6)])
    released = make(name, {"faithful": True})
    straight, mixed = (m.compress(tokens, 20) for m in (plain, released))
    order = mixed.index.argsort(1)
    assert torch.equal(mixed.index.gather(1, order), straight.index)
    same = torch.take_along_dim(mixed.features, order[..., None], 1)
    torch.testing.assert_close(same, straight.features)
    assert not torch.equal(mixed.index, straight.index)


def test_merging_joins_duplicates_first():
    features = torch.eye(8)[:, None].expand(8, 2, 8).reshape(1, 16, 8)
    kept = make("tome", {"metric": "features"}).compress(VisualTokens.from_features(features), 8)
    assert torch.equal(kept.features, torch.eye(8)[None])
    assert (kept.mass == 2).all()


def test_weights_count_as_copies():
    """A mean weighted by mass is the mean of as many copies."""
    values, moved = randn(1, 5, 3), torch.tensor([[0, 1, 0, -1, 1]])
    weights = torch.tensor([[1.0, 2, 3, 9, 1]])
    got = merging.group_mean(values, moved, 2, weights)
    copies = values.repeat_interleave(weights[0].long(), 1)
    wanted = merging.group_mean(copies, moved.repeat_interleave(weights[0].long(), 1), 2)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(merging.group_mean(values, moved, 3)[:, 2], torch.zeros(1, 3))


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("visionzip", {"contextual": -1}, ConfigError),
        ("visionzip", {"contextual": 1.5}, ConfigError),
        ("visionzip", {"contextual": True}, ConfigTypeError),
        ("prumerge", {"neighbours": -1}, ConfigError),
        ("prumerge", {"neighbours": 3.0}, ConfigTypeError),
        ("vispruner", {"important": 1.1}, ConfigError),
        ("vispruner", {"important": "half"}, ConfigTypeError),
        ("scope", {"alpha": -1}, ConfigError),
        ("scope", {"alpha": float("nan")}, ConfigError),
        ("holov", {"crops": 0}, ConfigError),
        ("holov", {"alpha": float("inf")}, ConfigError),
        ("vscan", {"window": 0}, ConfigError),
        ("vscan", {"local": -0.1}, ConfigError),
        ("tome", {"metric": "values"}, ConfigError),
        ("pitome", {"margin": 2}, ConfigError),
        ("pitome", {"margin": None}, ConfigTypeError),
    ],
)
def test_bad_options(name: str, options: dict[str, object], error: type[Exception]):
    with pytest.raises(error, match=name):
        create(name, **options)
