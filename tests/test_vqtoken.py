"""Codes of clusters: k-means, the adaptive length, and the token hash map with its attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import tiny
from tests.units import QUICK
from vlmcompress import patch
from vlmcompress.core.errors import (
    ConfigError,
    ConfigTypeError,
    EvidenceError,
    UnsupportedInputError,
)
from vlmcompress.core.tokens import Segment, VisualTokens
from vlmcompress.methods.connector.clustered import Clustered
from vlmcompress.methods.connector.vq_attention import VQAttention
from vlmcompress.methods.connector.vqtoken import VQToken, hash_maps
from vlmcompress.methods.layouts import layout, load_released
from vlmcompress.methods.ops import kmeans
from vlmcompress.methods.ops.kmeans import Clusters
from vlmcompress.methods.trained import ConnectorShape

GRID = (1, 6, 6)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def units(b: int, n: int, d: int, seed: int = 0) -> Tensor:
    return kmeans.unit(drawn(b, n, d, seed=seed))


def image(features: Tensor, grid: tuple[int, int, int] = GRID) -> VisualTokens:
    whole = (Segment("image", grid, slice(0, math.prod(grid))),)
    return VisualTokens.from_features(features, segments=whole)


def blobs(k: int, each: int, d: int = 24, seed: int = 0, noise: float = 0.05) -> Tensor:
    """[1, k * each, d] rows around k directions at right angles, of all lengths, shuffled."""
    mixed = torch.eye(d)[:k].repeat(each, 1) + noise * drawn(k * each, d, seed=seed)
    length = 1 + 5 * torch.rand(k * each, 1, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(k * each, generator=torch.Generator().manual_seed(seed))
    return (mixed * length)[order][None]


# --- k-means ----------------------------------------------------------------------------------


def kmeans_by_definition(x: Tensor, start: Tensor, iterations: int) -> tuple[list[int], Tensor]:
    """One unit ([n, d]) in float64, row by row."""
    x, centres = x.double(), start.double()
    labels: list[int] = []
    for _ in range(iterations):
        directions = centres / centres.norm(dim=1, keepdim=True)
        labels = [int((directions @ row).argmax()) for row in x]
        means = centres.clone()
        for c in set(labels):
            means[c] = torch.stack([x[i] for i, own in enumerate(labels) if own == c]).mean(0)
        if (means - centres).norm() < 1e-4:
            break
        centres = means
    return labels, centres


@QUICK
@given(
    n=st.integers(2, 60), share=st.floats(0, 1), seed=st.integers(0, 50), most=st.integers(1, 30)
)
def test_kmeans_is_what_it_says(n: int, share: float, seed: int, most: int):
    k = 1 + int(share * (n - 1))
    x = units(3, n, 5, seed)
    start = kmeans.seeds(x, k, seed)
    found = kmeans.kmeans(x, start, iterations=most)
    for i in range(3):
        labels, centres = kmeans_by_definition(x[i], start[i], most)
        assert found.labels[i].tolist() == labels
        torch.testing.assert_close(found.centres[i].double(), centres, atol=1e-5, rtol=0)


def test_units_stop_alone():
    x = units(4, 80, 4)
    start = kmeans.seeds(x, 9, 0)
    together = kmeans.kmeans(x, start, iterations=100)
    for i in range(4):
        alone = kmeans.kmeans(x[i : i + 1], start[i : i + 1], iterations=100)
        assert torch.equal(alone.labels[0], together.labels[i])
        assert torch.equal(alone.centres[0], together.centres[i])


def test_weights_count_as_copies():
    x = units(1, 12, 3)
    weights = torch.arange(1.0, 13)[None]
    copies = x[:, torch.arange(12).repeat_interleave(torch.arange(1, 13))]
    start = kmeans.seeds(x, 4, 0)
    weighted = kmeans.kmeans(x, start, iterations=20, weights=weights)
    copied = kmeans.kmeans(copies, start, iterations=20)
    torch.testing.assert_close(weighted.centres, copied.centres)


def test_an_empty_cluster_keeps_its_centre():
    x = kmeans.unit(torch.tensor([[[1.0, 0.1], [1.0, -0.1], [0.9, 0.0]]]))
    start = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    found = kmeans.kmeans(x, start, iterations=10)
    assert found.labels.tolist() == [[0, 0, 0]]
    assert torch.equal(found.centres[0, 1], start[0, 1])


def test_seeds_are_different_rows_and_leave_the_global_state_alone():
    x = units(2, 30, 4)
    before = torch.get_rng_state()
    found = kmeans.seeds(x, 30, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.sort(1).values, x.sort(1).values)
    assert torch.equal(kmeans.seeds(x, 7, 5), found[:, :7])
    assert torch.equal(kmeans.seeds(x[1:], 7, 5), found[1:, :7])
    assert not torch.equal(kmeans.seeds(x, 7, 6), found[:, :7])


def test_seeds_are_far_from_each_other():
    """A row of each of the blobs, where even draws would hit 5 of 8 on average."""
    x = kmeans.unit(blobs(8, 20, noise=0.01))
    for seed in range(20):
        like = kmeans.seeds(x, 8, seed)[0] @ torch.eye(24)[:8].T
        assert sorted(like.argmax(1).tolist()) == list(range(8))


def test_seeds_go_on_from_given_centres():
    x = kmeans.unit(blobs(3, 10, noise=0.01))
    given_ = torch.eye(24)[:2][None]
    found = kmeans.seeds(x, 3, 0, given=given_)
    assert torch.equal(found[:, :2], given_)
    assert int(found[0, 2].argmax()) == 2


def test_more_clusters_than_rows():
    with pytest.raises(ConfigError, match="5 tokens have no 6 clusters; ask for 1 to 5"):
        kmeans.seeds(units(1, 5, 3), 6, 0)


@QUICK
@given(
    distinct=st.integers(1, 6), copies=st.integers(1, 6), seed=st.integers(0, 30), data=st.data()
)
def test_no_cluster_stays_empty(distinct: int, copies: int, seed: int, data: Any):
    n = distinct * copies
    k = data.draw(st.integers(1, n))
    x = units(2, distinct, 4, seed).repeat(1, copies, 1)
    found = kmeans.kmeans(x, kmeans.seeds(x, k, seed), iterations=10)
    labels = kmeans.filled(x, found)
    assert all(len(set(row)) == k for row in labels.tolist())
    moved = (labels != found.labels).sum(1)
    empty = [k - len(set(row)) for row in found.labels.tolist()]
    assert moved.tolist() == empty


def test_the_farthest_rows_fill_empty_clusters():
    x = kmeans.unit(torch.tensor([[[1.0, 0.0], [1.0, 0.3], [1.0, 0.9], [0.0, 1.0]]]))
    centres = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    labels = kmeans.filled(x, Clusters(torch.tensor([[0, 0, 0, 1]]), centres))
    assert labels.tolist() == [[0, 0, 2, 1]]


def test_labels_in_order_of_first_appearance():
    labels, first = kmeans.in_order(torch.tensor([[2, 0, 2, 1, 0], [0, 1, 1, 2, 0]]), 3)
    assert labels.tolist() == [[0, 1, 0, 2, 1], [0, 1, 1, 2, 0]]
    assert first.tolist() == [[0, 1, 3], [0, 1, 3]]


def silhouette_by_definition(x: Tensor, labels: list[int]) -> float:
    distance = 1 - x.double() @ x.double().T
    scores = []
    for i, own in enumerate(labels):
        to = {
            c: [float(distance[i, j]) for j, other in enumerate(labels) if other == c and j != i]
            for c in set(labels)
        }
        if not to[own] or len(to) == 1:
            scores.append(0.0)
            continue
        within = sum(to[own]) / len(to[own])
        beyond = min(sum(v) / len(v) for c, v in to.items() if c != own)
        scores.append((beyond - within) / max(beyond, within))
    return sum(scores) / len(scores)


@QUICK
@given(n=st.integers(1, 30), k=st.integers(1, 6), seed=st.integers(0, 50))
def test_silhouette_is_what_it_says(n: int, k: int, seed: int):
    x = units(2, n, 4, seed)
    labels = torch.randint(k, (2, n), generator=torch.Generator().manual_seed(seed))
    want = [silhouette_by_definition(x[i], labels[i].tolist()) for i in range(2)]
    got = kmeans.silhouette(x, labels, k)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-5, rtol=0)


def test_silhouette_depends_on_the_clustering():
    x = kmeans.unit(blobs(4, 8, noise=0.01))
    right = x[..., :4].argmax(2)
    wrong = torch.arange(32)[None] % 4
    assert kmeans.silhouette(x, right, 4) > 0.9 > 0.2 > kmeans.silhouette(x, wrong, 4)


def test_elbow():
    assert kmeans.elbow(torch.tensor([[9.0, 5, 1, 0.9, 0.8], [9, 2, 1, 0.5, 0]])).tolist() == [2, 1]
    assert kmeans.elbow(torch.tensor([[9.0, 5]])).tolist() == [0]


# --- codes ------------------------------------------------------------------------------------


def test_codes_are_means_of_their_tokens():
    tokens = image(3 * drawn(2, 36, 8))
    kept = VQToken(rescale=False).compress(tokens, 5)
    scaled = VQToken().compress(tokens, 5)
    directions = tokens.features / tokens.features.norm(dim=2, keepdim=True)
    assert kept.assignment is not None
    for i, where in enumerate(kept.assignment):
        means = torch.stack([directions[i, where == c].mean(0) for c in range(5)])
        torch.testing.assert_close(kept.features[i], means)
        length = tokens.features[i].norm(dim=1).mean()
        torch.testing.assert_close(scaled.features[i], means * length)
        first = [int((where == c).nonzero()[0]) for c in range(5)]
        assert first == sorted(first) == kept.index[i].tolist()
        assert kept.mass[i].tolist() == where.bincount().tolist()


def test_clusters_that_there_are_are_found():
    tokens = VisualTokens.from_features(blobs(7, 9))
    kept = VQToken().compress(tokens, 7)
    direction = tokens.features[0].argmax(1)
    assert kept.assignment is not None
    for code in range(7):
        assert len(set(direction[kept.assignment[0] == code].tolist())) == 1


def test_a_video_is_clustered_jointly_and_its_hash_map_is_its_shape():
    frame = blobs(4, 4, seed=2)
    tokens = image(torch.cat([frame, frame.flip(1), frame], 1), (3, 4, 4))
    kept = VQToken().compress(tokens, 4)
    (where,) = hash_maps(kept)
    assert where.shape == (1, 3, 4, 4)
    assert torch.equal(where[:, 0], where[:, 2])
    assert torch.equal(where[:, 1].flatten(1), where[:, 0].flatten(1).flip(1))
    assert kept.mass.tolist() == [[12.0] * 4]
    (untouched,) = hash_maps(tokens)
    assert torch.equal(untouched.flatten(), torch.arange(48))


def test_tokens_count_for_as_many_as_they_stand_for():
    tokens = image(drawn(1, 36, 4))
    heavy = dataclasses.replace(tokens, mass=torch.arange(1.0, 37)[None])
    kept = VQToken(rescale=False).compress(heavy, 1)
    directions, share = kmeans.unit(tokens.features[0]), heavy.mass[0] / heavy.mass.sum()
    torch.testing.assert_close(kept.features[0, 0], share @ directions)
    scaled = VQToken().compress(heavy, 1)
    length = share @ tokens.features[0].norm(dim=1)
    torch.testing.assert_close(scaled.features[0, 0], share @ directions * length)


def test_seeds_of_the_option():
    tokens = image(drawn(1, 36, 8))
    one, again = (VQToken(seed=1).compress(tokens, 6) for _ in range(2))
    assert torch.equal(one.features, again.features)
    others = [VQToken(seed=s).compress(tokens, 6).features for s in range(2, 8)]
    assert any(not torch.equal(one.features, other) for other in others)


def test_fewer_different_tokens_than_codes():
    tokens = image(drawn(1, 4, 8).repeat(1, 9, 1))
    kept = VQToken().compress(tokens, 10)
    assert kept.n == 10
    assert kept.features.isfinite().all()
    assert kept.mass.min() == 1
    assert kept.mass.sum() == 36


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tokens_that_are_no_numbers(value: float):
    features = drawn(1, 36, 8)
    features[0, 3, 1] = value
    for run in (lambda m, t: m.compress(t, 4), lambda m, t: m.counts(t), lambda m, t: m.adapt(t)):
        with pytest.raises(UnsupportedInputError, match="vqtoken cannot cluster tokens that hold"):
            run(VQToken(), image(features))


def test_a_token_of_zeros_is_none():
    features = drawn(1, 36, 8)
    features[0, 3] = 0
    assert VQToken().compress(image(features), 4).features.isfinite().all()


# --- adaptive length --------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["elbow", "silhouette"])
@pytest.mark.parametrize("k", [4, 9, 15])
def test_the_number_of_clusters_is_found(criterion: Any, k: int):
    method = VQToken(smallest=2, largest=20, criterion=criterion)
    tokens = VisualTokens.from_features(blobs(k, 12, seed=k))
    assert method.counts(tokens) == [k]
    kept = method.adapt(tokens)
    assert kept.n == k
    assert kept.mass.tolist() == [[12.0] * k]


def test_adapt_takes_the_clusters_that_counts_came_from():
    tokens = image(drawn(1, 36, 6, seed=3))
    method = VQToken(smallest=3, largest=9)
    kept = method.adapt(tokens)
    assert [kept.n] == method.counts(tokens)
    assert torch.equal(kept.features, method.adapt(tokens).features)


def test_a_batch_counts_as_its_images():
    tokens = image(torch.cat([drawn(3, 36, 6, seed=s) for s in range(2)]))
    method = VQToken(smallest=2, largest=12)
    counts = method.counts(tokens)
    alone = [method.counts(tokens.take_units(torch.tensor([i])))[0] for i in range(6)]
    assert counts == alone
    assert len(set(counts)) > 1
    with pytest.raises(ConfigError, match="different numbers of codes"):
        method.adapt(tokens)


@dataclasses.dataclass(frozen=True)
class Recording(VQToken):
    """Remembers what k-means began with and came to."""

    runs: list[tuple[Tensor, Clusters]] = dataclasses.field(default_factory=list)

    def clusters(self, tokens: VisualTokens, x: Tensor, start: Tensor) -> Clusters:
        found = super().clusters(tokens, x, start)
        self.runs.append((start, found))
        return found


def test_each_number_starts_from_the_one_before():
    method = Recording(smallest=2, largest=12)
    tokens = image(drawn(2, 36, 6))
    method.counts(tokens)
    assert [found.k for _, found in method.runs] == list(range(2, 13))
    for (_, before), (start, _) in zip(method.runs, method.runs[1:], strict=False):
        assert torch.equal(start[:, : before.k], before.centres)
    x = kmeans.unit(tokens.features)
    curve = torch.stack([kmeans.distortion(x, found) for _, found in method.runs])
    assert (curve.diff(dim=0) <= 1e-6).all()


def test_as_released_each_number_starts_anew():
    method = Recording(smallest=2, largest=5, faithful=True)
    tokens = image(drawn(1, 36, 6))
    method.counts(tokens)
    x = kmeans.unit(tokens.features)
    for start, found in method.runs:
        assert torch.equal(start, kmeans.seeds(x, found.k, 0, candidates=1))


def test_the_released_elbow_is_not_offset():
    """Fifteen clusters: the bend is the second of a search from 14, and 4 is added to place 0."""
    tokens = VisualTokens.from_features(blobs(15, 12))
    assert VQToken(smallest=14, largest=20).counts(tokens) == [15]
    assert VQToken(smallest=14, largest=20, faithful=True).counts(tokens) == [14]
    small = VisualTokens.from_features(blobs(6, 12))
    assert VQToken(smallest=2, largest=12).counts(small) == [6]
    # Second differences are of 3 and on: that of 6 is at place 3.
    assert VQToken(smallest=2, largest=12, faithful=True).counts(small) == [7]
    flat = VQToken(smallest=2, largest=12, criterion="silhouette", faithful=True)
    assert flat.counts(small) == [2]


def test_few_tokens_stay_as_they_are():
    tokens = VisualTokens.from_features(drawn(2, 9, 4))
    method = VQToken()
    assert method.counts(tokens) == [9, 9]
    assert method.adapt(tokens) is tokens
    assert VQToken(smallest=4, largest=99).counts(tokens) <= [9, 9]


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"smallest": 0}, ConfigError, "at least 1"),
        ({"smallest": 9, "largest": 8}, ConfigError, "largest is 8; it must be at least 9"),
        ({"iterations": 0}, ConfigError, "at least 1"),
        ({"criterion": "gap"}, ConfigError, "allowed are 'elbow', 'silhouette'"),
        ({"rescale": 1}, ConfigTypeError, "True or False"),
        ({"faithful": None}, ConfigTypeError, "True or False"),
        ({"attention": "yes"}, ConfigTypeError, "True or False"),
        ({"heads": 0}, ConfigError, "at least 1"),
        ({"seed": -1}, ConfigError, "at least 0"),
        ({"weights": "a.safetensors"}, ConfigError, "set attention=True"),
        ({"weights": 3, "attention": True}, ConfigTypeError, "path of a .safetensors"),
        ({"tokens": 0}, ConfigError, "at least 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        VQToken(**options)


def test_budgets():
    assert VQToken(tokens=32).own_budget
    assert not VQToken().own_budget
    assert not VQToken().learns
    assert VQToken(attention=True).learns
    segments = image(drawn(1, 36, 4)).segments
    assert VQToken().tokens_kept(segments, 0.25) == 9
    video = (Segment("image", (40, 2, 2), slice(0, 160)),)
    assert VQToken(attention=True, faithful=True).tokens_kept(video, 8) == 40
    assert VQToken(attention=True).tokens_kept(video, 8) == 8


# --- VQ-Attention -----------------------------------------------------------------------------


def shape(width: int = 16, grid: tuple[int, int] | None = (6, 6)) -> ConnectorShape:
    return ConnectorShape(width, width, 0, grid, 4)


def attention(**options: Any) -> tuple[VQToken, VQAttention]:
    method = VQToken(attention=True, heads=4, **options)
    parts = method.parts(shape())
    assert parts is not None
    return method, parts


def moved_places(parts: VQAttention) -> None:
    """Weights far from those of the start, so that every input shows."""
    with torch.no_grad():
        for i, parameter in enumerate(parts.parameters()):
            parameter.copy_(0.3 * drawn(*parameter.shape, seed=i) + (parameter.ndim == 1))


def test_codes_alone_learn_nothing():
    assert VQToken().parts(shape()) is None


def test_parts_of_one_seed_are_equal_and_evaluate():
    before = torch.get_rng_state()
    one, other = (attention(seed=3)[1] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not one.training
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    codes, labels = units(2, 4, 16), torch.arange(36).repeat(2, 1) % 4
    assert torch.equal(one.by_code(codes, labels, GRID), one.by_code(codes, labels, GRID))


def test_untrained_it_changes_codes_by_next_to_nothing():
    _, parts = attention()
    codes, labels = units(2, 4, 16), torch.arange(36).repeat(2, 1) % 4
    told = parts.by_code(codes, labels, GRID)
    assert 0 < (told - codes).norm() < 0.05 * codes.norm()


def test_it_knows_where_tokens_lie_and_when():
    _, parts = attention()
    moved_places(parts)
    codes = units(1, 3, 16)
    labels = torch.arange(72)[None] % 3
    video = (2, 6, 6)
    told = parts.by_code(codes, labels, video)
    assert not torch.allclose(told, parts.by_code(codes, labels.roll(1, 1), video), atol=1e-4)
    # The same places, one code's in the second frame only.
    early = torch.cat([torch.zeros(1, 36, dtype=torch.int64), torch.ones(1, 36).long()], 1)
    assert not torch.allclose(
        parts.by_code(codes[:, :2], early, video), parts.by_code(codes[:, :2], 1 - early, video)
    )


def test_codes_answer_to_their_own_places():
    """Renumbered codes give the same rows, renumbered."""
    _, parts = attention()
    moved_places(parts)
    codes, labels = units(1, 3, 16), torch.arange(36)[None] % 3
    order = torch.tensor([2, 0, 1])
    told = parts.by_code(codes, labels, GRID)
    again = parts.by_code(codes[:, order], order.argsort()[labels], GRID)
    torch.testing.assert_close(again, told[:, order], atol=1e-5, rtol=1e-5)


def test_images_of_another_size_are_averaged_over():
    _, parts = attention()
    moved_places(parts)
    labels = (torch.arange(36) % 4).view(6, 6)
    fine = labels.repeat_interleave(2, 0).repeat_interleave(2, 1)
    codes = units(1, 4, 16)
    coarse = parts.by_code(codes, labels.flatten()[None], GRID)
    torch.testing.assert_close(parts.by_code(codes, fine.flatten()[None], (1, 12, 12)), coarse)


def test_gradients_reach_all_of_it_and_the_tokens():
    _, parts = attention()
    parts.train()
    codes = units(2, 4, 16).requires_grad_()
    labels = torch.arange(36).repeat(2, 1) % 4
    parts.by_code(codes, labels, GRID).square().sum().backward()
    assert codes.grad is not None
    assert (codes.grad.abs().sum(2) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.parameters())


def test_released_queries_are_frames():
    _, parts = attention(faithful=True)
    moved_places(parts)
    codes, numbers = units(1, 5, 16), torch.randint(5, (1, 3, 36), generator=torch.Generator())
    few = parts.by_frame(codes, numbers)
    assert few.shape == (1, 5, 16)
    torch.testing.assert_close(few[:, :2], few[:, 3:])  # frames 0 and 1 once more
    many = parts.by_frame(codes, numbers[:, :1].repeat(1, 7, 1))
    assert many.shape == (1, 7, 16)
    with pytest.raises(ConfigError, match="frames of 36 tokens and got 12"):
        parts.by_frame(codes, numbers[:, :, :12])


def test_heads_and_sizes_that_do_not_fit():
    with pytest.raises(ConfigError, match="3 heads do not divide the LLM's width of 16"):
        VQToken(attention=True, heads=3).parts(shape())
    with pytest.raises(ConfigError, match="use faithful=False"):
        VQToken(attention=True, faithful=True).parts(shape(grid=None))
    parts = VQToken(attention=True).parts(shape(grid=None))
    assert parts is not None
    labels = torch.arange(36)[None] % 4
    assert parts.by_code(units(1, 4, 16), labels, GRID).shape == (1, 4, 16)


def test_weights_come_back_and_are_for_one_reading(tmp_path):
    _, parts = attention(seed=1)
    path = str(tmp_path / "vq.safetensors")
    parts.save(path)
    _, back = attention(seed=2, weights=path)
    assert all(
        torch.equal(a, b) for a, b in zip(parts.parameters(), back.parameters(), strict=True)
    )
    with pytest.raises(ConfigError, match="by 'code' instead of 'frame'"):
        attention(faithful=True, weights=path)


def test_without_parts_it_says_so():
    with pytest.raises(EvidenceError, match="VQAttention"):
        VQToken(attention=True).compress(image(drawn(1, 36, 16)), 4)


def test_rows_of_the_method_are_those_of_its_attention():
    method, parts = attention()
    moved_places(parts)
    tokens = dataclasses.replace(image(3 * drawn(2, 36, 16)), parts=parts)
    kept = method.compress(tokens, 5)
    plain = VQToken(rescale=False).compress(tokens, 5)
    assert kept.assignment is not None
    assert torch.equal(kept.index, plain.index)
    told = parts.by_code(plain.features, kept.assignment, GRID)
    length = tokens.features.norm(dim=2).mean(1)[:, None, None]
    torch.testing.assert_close(kept.features, told * length)
    # All kept: nothing is bypassed.
    assert not torch.allclose(method.compress(tokens, 36).features, tokens.features, atol=1e-2)


def test_released_rows_stand_for_frames_where_they_are_more_than_codes():
    method, parts = attention(faithful=True, rescale=False)
    moved_places(parts)
    video = dataclasses.replace(image(drawn(1, 5 * 36, 16), (5, 6, 6)), parts=parts)
    kept = method.compress(video, 3)
    assert kept.n == method.tokens_kept(video.segments, 3) == 5
    assert kept.index.tolist() == [[0, 36, 72, 108, 144]]
    assert kept.mass.tolist() == [[36.0] * 5]
    plain = VQToken(faithful=True, rescale=False).compress(video, 3)
    (numbers,) = hash_maps(plain)
    told = parts.by_frame(plain.features, numbers.flatten(2))
    torch.testing.assert_close(kept.features, told)
    assert method.counts(video) == [12]


def test_tokens_of_several_rectangles_have_no_place():
    method, parts = attention()
    halves = (Segment("tile", (1, 3, 6), slice(0, 18)), Segment("tile", (1, 3, 6), slice(18, 36)))
    tokens = VisualTokens.from_features(drawn(1, 36, 16), segments=halves)
    with pytest.raises(ConfigError, match="there are 2; use scope='tile'"):
        method.compress(dataclasses.replace(tokens, parts=parts), 4)
    thinned = image(drawn(1, 36, 16)).select(torch.arange(0, 36, 2)[None])
    with pytest.raises(ConfigError, match="these 18 form none: an earlier method"):
        method.compress(dataclasses.replace(thinned, parts=parts), 4)


# --- released names ---------------------------------------------------------------------------


def test_names_of_the_released_checkpoint(tmp_path):
    from safetensors.torch import save_file

    sizes = {"places": 36, "width": 16, "hidden": 2048}
    told = layout("vqtoken")
    assert told.sizes == {"places": 729, "width": 896, "hidden": 2048}
    _, parts = attention(faithful=True)
    shapes = told.shapes(sizes)
    assert {told.prefix + name: tuple(v.shape) for name, v in parts.state_dict().items()} == shapes
    released = {
        name: drawn(*size, seed=i).to(getattr(torch, told.dtype))
        for i, (name, size) in enumerate(shapes.items())
    }
    path = tmp_path / "model.safetensors"
    save_file({**released, "model.embed_tokens.weight": torch.zeros(2, 2)}, str(path))
    load_released(parts, path)
    for name, value in parts.state_dict().items():
        assert torch.equal(value, released[told.prefix + name].float())


# --- in a model -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
@pytest.mark.parametrize("keep", [3, "auto"])
def test_in_a_model(family: str, keep: Any):
    model = tiny.build(family)
    inputs = tiny.inputs(model, [tiny.Prompt(1, 5), tiny.Prompt(2, 4)])
    with patch(model, VQToken(smallest=2, largest=6), keep=keep) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        lengths = [len(rows) for rows in handle.last.kept]
        assert len(lengths) == 3
        assert lengths == [3] * 3 if keep == 3 else all(2 <= n <= 6 for n in lengths)


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl"])
@pytest.mark.parametrize("keep", [4, "auto"])
def test_attention_in_a_model(family: str, keep: Any):
    model = tiny.build(family)
    inputs = tiny.inputs(model, [tiny.Prompt(1, 5), tiny.Prompt(2, 4)])
    method = VQToken(attention=True, heads=4, smallest=2, largest=6)
    with patch(model, method, keep=keep) as handle:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads = [p.grad for p in handle.parts.parameters()]
        assert all(g is not None and g.abs().sum() > 0 for g in grads)
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > 0


def test_attention_over_tiles():
    model = tiny.build("llava_next")
    inputs = tiny.inputs(model, [tiny.Prompt(1, 5)])
    tiles = "vqtoken(attention=True, heads=4, scope='tile'):3"
    with patch(model, tiles) as handle:
        model(**inputs)
        (n,) = handle.last.tokens_after
        assert n % 3 == 0
    with (
        patch(model, VQToken(attention=True, heads=4), keep=3),
        pytest.raises(ConfigError, match="scope='tile'"),
    ):
        model(**inputs)


def test_a_budget_among_the_options():
    model = tiny.build("llava")
    inputs = tiny.inputs(model, [tiny.Prompt(1, 5)])
    with patch(model, VQToken(tokens=5)) as handle:
        model(**inputs)
        assert handle.last.tokens_after == (5,)


def test_base_is_abstract():
    assert Clustered.__abstractmethods__ == {"rows", "parts"}
