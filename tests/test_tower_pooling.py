"""Token clustering, Vote&Mix and HVT on tensors: each against its rule written out in loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, cosine_similarity, max_pool1d

from tests.test_tower_methods import make, state_for, unit
from tests.units import QUICK, seeds
from vlmcompress.core.errors import ConfigError, ConfigTypeError, EvidenceError
from vlmcompress.methods import create
from vlmcompress.methods.ops import clustering, grid
from vlmcompress.methods.tower.base import TowerAttention, TowerState
from vlmcompress.methods.tower.vomix import votes

# --- token clustering -----------------------------------------------------------------------------


def clusters_in_loops(
    x: Tensor, cells: tuple[int, int], window: int, iterations: int, temperature: float
) -> list[Tensor]:
    """Centres of one image ([side, side, c]), a place and a centre at a time."""
    side, (rows, columns) = len(x), cells
    places = [(r, c) for r in range(side) for c in range(side)]
    centres = []
    for i in range(rows):
        for j in range(columns):
            down = range(i * side // rows, -(-(i + 1) * side // rows))
            across = range(j * side // columns, -(-(j + 1) * side // columns))
            centres.append(torch.stack([x[r, c] for r in down for c in across]).mean(0))
    for _ in range(iterations):
        drawn: list[list[tuple[float, Tensor]]] = [[] for _ in centres]
        for r, c in places:
            own = (r * rows // side, c * columns // side)
            near = [
                k
                for k in range(len(centres))
                if abs(k // columns - own[0]) <= window // 2
                and abs(k % columns - own[1]) <= window // 2
            ]
            pull = [-float((x[r, c] - centres[k]).square().sum()) / temperature for k in near]
            total = math.fsum(math.exp(p - max(pull)) for p in pull)
            for k, p in zip(near, pull, strict=True):
                drawn[k].append((math.exp(p - max(pull)) / total, x[r, c]))
        centres = [sum(w * v for w, v in ws) / math.fsum(w for w, _ in ws) for ws in drawn]
    return centres


@pytest.mark.parametrize(("side", "cells"), [(5, (2, 3)), (6, (3, 2)), (6, (5, 5)), (4, (1, 4))])
@pytest.mark.parametrize(("window", "temperature"), [(1, 2.0), (3, 0.5), (5, 30.0)])
def test_clusters_equal_those_of_loops(side, cells, window, temperature):
    generator = torch.Generator().manual_seed(side)
    x = torch.randn(2, side, side, 4, generator=generator, dtype=torch.double)
    got = clustering.local_clusters(
        x.permute(0, 3, 1, 2), cells, window=window, iterations=3, temperature=temperature
    )
    for image, centres in zip(x, got, strict=True):
        want = torch.stack(clusters_in_loops(image, cells, window, 3, temperature))
        torch.testing.assert_close(centres, want, rtol=1e-6, atol=1e-8)


@QUICK
@given(n=st.integers(1, 12), k=st.integers(1, 8), m=st.integers(1, 10), seed=seeds)
def test_weights_are_a_softmax_over_the_nearest(n: int, k: int, m: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    places, centres = (torch.randn(1, i, 3, generator=generator).double() for i in (n, k))
    distances = clustering.squared_distances(places, centres)
    for unit_length in (False, True):
        got = clustering.nearest_weights(distances, m, 0.7, unit_length=unit_length)[0]
        for place, weights in zip(places[0], got, strict=True):
            far = [float((place - centre).square().sum()) for centre in centres[0]]
            near = sorted(range(k), key=lambda i: far[i])[:m]
            raw = torch.tensor([math.exp(-far[i] / 0.7) if i in near else 0.0 for i in range(k)])
            want = raw / (raw.norm() if unit_length else raw.sum())
            torch.testing.assert_close(weights.float(), want, rtol=1e-4, atol=1e-6)


def test_a_cluster_that_nothing_is_drawn_to_stays_where_it_was():
    """The patches of the cell in the middle lie far apart, and neither is near their mean, 0.5."""
    x = torch.tensor([[[[0.0, 0.0, 10.0, -9.0, 9.0, 9.0]]]])
    got = clustering.local_clusters(x, (1, 3), window=5, iterations=1, temperature=1e-4)
    torch.testing.assert_close(got.flatten(), torch.tensor([-3.0, 0.5, 28 / 3]))


def test_patches_far_from_all_clusters_are_made_of_the_nearest():
    distances = torch.tensor([[[1e6, 1e6 + 1, 4e6]]])
    got = clustering.nearest_weights(distances, 3, 1.0)
    want = torch.tensor([[[1.0, math.exp(-1), 0.0]]]) / (1 + math.exp(-1))
    torch.testing.assert_close(got, want)


def test_flat_images_stay_flat():
    """No scatter within cells, and so no scale for the temperature."""
    x = torch.full((1, 36, 4), 7.0)
    whole = make("token_clustering", {}).reduce(2, TowerState.whole(x, 0, 12), 6).restored()
    torch.testing.assert_close(whole.hidden, x)


def test_distances_do_not_drown_far_from_the_origin():
    places = torch.rand(1, 9, 4, dtype=torch.double)
    centres = torch.rand(1, 3, 4, dtype=torch.double)
    want = (places[:, :, None] - centres[:, None]).square().sum(3)
    got = clustering.squared_distances((places + 500).float(), (centres + 500).float())
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-3)


def test_patches_are_made_again_of_the_refined_clusters():
    state = state_for(36)
    method = make("token_clustering", {"neighbours": 3, "temperature": 4.0})
    short = method.reduce(4, state, 6)
    patches, centres = state.hidden[:, 1:], short.hidden[:, 1:]
    refined = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(5))
    whole = dataclasses.replace(short, hidden=refined).restored()
    assert whole.patches == 36
    assert whole.recipe is None
    assert whole.mass.eq(1).all()
    assert torch.equal(whole.source, state.source)
    assert torch.equal(whole.assignment, state.assignment)
    assert torch.equal(whole.hidden[:, 0], refined[:, 0])
    for b in range(2):
        for p in range(36):
            far = [float((patches[b, p] - c).square().sum()) for c in centres[b]]
            near = sorted(range(6), key=lambda i: far[i])[:3]
            weights = [math.exp((min(far) - far[i]) / 4.0) for i in near]
            want = sum(w * refined[b, i + 1] for w, i in zip(weights, near, strict=True))
            want = want / math.fsum(weights)
            torch.testing.assert_close(whole.hidden[b, p + 1], want, rtol=1e-4, atol=1e-5)


def test_released_weights_have_the_euclidean_length_one():
    state = state_for(36)
    plain = make("token_clustering", {}).reduce(4, state, 6).recipe
    released = make("token_clustering", {"faithful": True}).reduce(4, state, 6).recipe
    assert plain is not None
    assert released is not None
    torch.testing.assert_close(plain.sum(2), torch.ones(2, 36))
    torch.testing.assert_close(released.norm(dim=2), torch.ones(2, 36))
    torch.testing.assert_close(released, plain / plain.norm(dim=2, keepdim=True))


def test_a_patch_belongs_to_the_nearest_cluster_or_names_its_own():
    state = state_for(36)
    short = make("token_clustering", {}).reduce(4, state, 6)
    assert short.source[0, 1:].tolist() == [6, 8, 10, 24, 26, 28]  # cells of 3 x 2 patches
    for b in range(2):
        named = short.source[b, 1:].tolist()
        for p in range(36):
            far = (state.hidden[b, p + 1] - short.hidden[b, 1:]).square().sum(1)
            own = named.index(p) if p in named else int(far.argmin())
            assert int(short.assignment[b, p]) == own + 1


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e3])
def test_the_scale_of_the_states_does_not_matter(scale):
    state = state_for(36)
    large = dataclasses.replace(state, hidden=state.hidden * scale)
    some, other = (make("token_clustering", {}).reduce(4, s, 9) for s in (state, large))
    torch.testing.assert_close(some.hidden * scale, other.hidden, rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(some.recipe, other.recipe, rtol=1e-3, atol=1e-4)


def test_the_temperature_is_a_tenth_of_the_scatter_in_cells():
    x = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    want = []
    for i in range(2):
        for j in range(3):
            cell = x[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
            want.append((cell - cell.mean(1, keepdim=True)).square().sum(0).mean())
    torch.testing.assert_close(clustering.scatter_in_cells(x, (2, 3))[0], torch.stack(want).mean())
    state = state_for(16, b=1)
    patches = state.hidden[:, 1:].transpose(1, 2).reshape(1, 8, 4, 4)
    t = 0.1 * float(clustering.scatter_in_cells(patches, (2, 2)))
    some, other = (
        make("token_clustering", o).reduce(4, state, 4) for o in ({}, {"temperature": t})
    )
    torch.testing.assert_close(some.hidden, other.hidden)
    torch.testing.assert_close(some.recipe, other.recipe)


def test_clusters_that_stand_for_what_they_are_made_of():
    """Two flat halves: two clusters hold them exactly, and reconstruction is the image itself."""
    values = torch.tensor([[1.0, 5.0], [-3.0, 2.0]])
    x = values[[0 if c < 3 else 1 for _ in range(6) for c in range(6)]][None]
    short = make("token_clustering", {}).reduce(2, TowerState.whole(x, 0, 12), 2)
    torch.testing.assert_close(short.hidden[0], values)
    assert short.mass.tolist() == [[18.0, 18.0]]
    torch.testing.assert_close(
        make("token_clustering", {"temperature": 0.1})
        .reduce(2, TowerState.whole(x, 0, 12), 2)
        .restored()
        .hidden,
        x,
    )


@QUICK
@given(side=st.integers(2, 27), keep=st.one_of(st.floats(0.02, 1), st.integers(1, 700)))
def test_the_schedule_comes_back_to_all_patches(side: int, keep: float | int):
    n, method = side * side, make("token_clustering", {})
    k = method.tokens_kept(n, keep)
    wanted = max(1, min(n, math.floor(n * keep + 0.5) if isinstance(keep, float) else keep))
    assert 1 <= k <= wanted
    assert math.prod(grid.squarest(side, k)) == k
    plan = method.schedule(n, keep, 24, 22)
    assert plan == (*[n] * 10, *[k] * 12, n)
    until = make("token_clustering", {"layer": 2, "until": -4})
    assert until.schedule(n, keep, 24, 22) == (n, n, *[k] * 18, n, n, n)


@pytest.mark.parametrize(("keep", "k"), [(0.1, 56), (0.5, 272), (0.25, 144), (1, 1), (1.0, 576)])
def test_token_clustering_counts_cells(keep: float | int, k: int):
    assert create("token_clustering").tokens_kept(576, keep) == k


def test_nothing_is_made_again_without_a_recipe():
    with pytest.raises(EvidenceError, match="nothing says how to make again"):
        state_for(9).restored()
    clustered = make("token_clustering", {"reconstruct": False}).reduce(3, state_for(36), 6)
    assert clustered.recipe is None
    short = make("token_clustering", {}).reduce(3, state_for(36), 6)
    assert short.recipe is not None
    rows = torch.arange(4).expand(2, -1)
    assert short.select(rows).recipe is None


def test_reconstruction_leaves_gradients():
    state = state_for(36)
    x = state.hidden.clone().requires_grad_()
    whole = (
        make("token_clustering", {}).reduce(4, dataclasses.replace(state, hidden=x), 9).restored()
    )
    whole.hidden[:, 1:].sum().backward()
    assert x.grad is not None
    assert (x.grad[:, 1:].abs().sum(2) > 0).all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layer": 1.5}, ConfigError, "share of depth"),
        ({"until": "x"}, ConfigTypeError, "must be an int"),
        ({"window": 4}, ConfigError, "it must be odd"),
        ({"window": 0}, ConfigError, "at least 1"),
        ({"iterations": 0}, ConfigError, "at least 1"),
        ({"neighbours": 0.5}, ConfigTypeError, "must be an int"),
        ({"temperature": 0}, ConfigError, "it must be above"),
        ({"temperature": math.nan}, ConfigError, "finite"),
        ({"reconstruct": 1}, ConfigTypeError, "True or False"),
        ({"faithful": None}, ConfigTypeError, "True or False"),
        ({"reconstruct": False, "until": 5}, ConfigError, "leave them out, too"),
        ({"reconstruct": False, "faithful": True}, ConfigError, "leave them out, too"),
    ],
)
def test_token_clustering_options(options, error, match):
    with pytest.raises(error, match=match):
        create("token_clustering", **options)


def test_clusters_that_no_block_would_see():
    with pytest.raises(ConfigError, match="no block runs on the clusters"):
        create("token_clustering", layer=7, until=7).schedule(36, 0.5, 12, 10)
    with pytest.raises(ConfigError, match="no block runs on the clusters"):
        create("token_clustering", layer=10).schedule(36, 0.5, 12, 10)
    with pytest.raises(ConfigError, match="layer 11"):
        create("token_clustering", until=11).schedule(36, 0.5, 12, 10)
    with pytest.raises(ConfigError, match="square map of patches, and there are 12"):
        create("token_clustering").tokens_kept(12, 0.5)
    with pytest.raises(ConfigError, match="has 13 of them"):
        grid.squarest(5, 13)


# --- Vote&Mix -------------------------------------------------------------------------------------


def vomix_in_loops(state: TowerState, k: int, temperature: float) -> tuple[list[int], Tensor]:
    """Patches retained of the first image, and their rows."""
    keys = state.attended().k[0].mean(0)[1:]
    x, n = state.hidden[0, 1:], len(state.hidden[0]) - 1
    similar = [[float(cosine_similarity(a, b, 0)) for b in keys] for a in keys]
    got = [0.0] * n
    for i in range(n):
        j = max((j for j in range(n) if j != i), key=lambda j: similar[i][j])
        got[j] += similar[i][j]
    order = sorted(range(n), key=lambda i: -got[i])
    selected, retained = order[: n - k], sorted(order[n - k :])
    rows, mass = {i: x[i] for i in retained}, dict.fromkeys(retained, 1.0)
    for s in selected:
        weights = [math.exp(similar[s][i] / temperature) for i in retained]
        for i, w in zip(retained, weights, strict=True):
            rows[i] = rows[i] + w / math.fsum(weights) * x[s]
            mass[i] += w / math.fsum(weights)
    return retained, torch.stack([rows[i] / mass[i] for i in retained])


@QUICK
@given(n=st.integers(4, 30), share=st.floats(0.2, 0.95), t=st.floats(0.05, 5), seed=seeds)
def test_vomix_equals_its_rule_in_loops(n: int, share: float, t: float, seed: int):
    state, k = state_for(n, seed=seed), max(1, int(n * share))
    short = make("vomix", {"temperature": t}).reduce(3, state, k)
    retained, rows = vomix_in_loops(state, k, t)
    assert short.source[0].tolist() == [-1, *retained]
    torch.testing.assert_close(short.hidden[0, 1:], rows, rtol=1e-4, atol=1e-5)
    assert torch.equal(short.hidden[:, 0], state.hidden[:, 0])


def test_votes_go_to_the_crowd():
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0]]])
    got = votes(keys)[0]
    a = float(cosine_similarity(keys[0, 0], keys[0, 1], 0))
    lone = float(cosine_similarity(keys[0, 1], keys[0, 3], 0))
    # Both neighbours vote for 0, and 0 for the first of them, as does the one that is like none.
    torch.testing.assert_close(got, torch.tensor([2 * a, a + lone, 0.0, 0.0]))


def test_votes_are_permuted_with_the_rows():
    keys = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(votes(keys[:, order]), votes(keys)[:, order])


def test_copies_are_mixed_into_each_other_at_low_temperature():
    """Of pairs of equal patches one of each goes, and what stays is what was."""
    x = state_for(8, b=1).hidden.clone()
    x[:, 5:] = x[:, 1:5]
    k = torch.cat([torch.ones(1, 5), torch.eye(5)[1:], torch.eye(5)[1:]])[None, None]
    state = dataclasses.replace(TowerState.whole(x, 1, 12), attention=TowerAttention(k, k, 0.5))
    short = make("vomix", {"temperature": 1e-3}).reduce(3, state, 4)
    # All have one vote, and the lower go.
    assert short.source.tolist() == [[-1, 4, 5, 6, 7]]
    assert short.mass.tolist() == [[1.0, 2.0, 2.0, 2.0, 2.0]]
    torch.testing.assert_close(short.hidden, x[:, [0, 5, 6, 7, 8]])


def test_mixing_is_a_mean():
    """Equal rows stay equal whatever is mixed into them."""
    state = state_for(20)
    state = dataclasses.replace(state, hidden=torch.full_like(state.hidden, 3.5))
    short = make("vomix", {}).reduce(3, state, 6)
    torch.testing.assert_close(short.hidden, torch.full((2, 7, 8), 3.5))


def test_vomix_published_schedule_and_options():
    assert create("vomix", r=0.1).schedule(196, None, 3, 2) == (177, 160, 144)
    assert create("vomix", r=0.0).schedule(196, None, 3, 2) == (196,) * 3
    for options in ({"r": 1}, {"r": -0.1}, {"temperature": 0}, {"temperature": -1}, {"layers": ()}):
        with pytest.raises(ConfigError):
            create("vomix", **options)
    with pytest.raises(ConfigTypeError):
        create("vomix", r="x")


# --- HVT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["max", "average"])
@QUICK
@given(n=st.integers(2, 60), share=st.floats(0.1, 0.99))
def test_hvt_covers_everything_evenly(pooling: str, n: int, share: float):
    state, k = state_for(n), max(1, int(n * share))
    short = make("hvt", {"pooling": pooling}).reduce(2, state, k)
    x = state.hidden[:, 1:]
    for i in range(k):
        window = x[:, i * n // k : -(-(i + 1) * n // k)]
        want = window.amax(1) if pooling == "max" else window.mean(1)
        torch.testing.assert_close(short.hidden[:, i + 1], want)
        mine = (short.assignment[0] == i + 1).nonzero()[:, 0].tolist()
        assert set(mine) <= set(range(i * n // k, -(-(i + 1) * n // k)))
    assert (short.assignment >= 1).all()
    assert short.mass[:, 1:].sum(1).tolist() == [n, n]
    assert (short.source[:, 1:].diff() > 0).all()
    assert torch.equal(short.hidden[:, 0], state.hidden[:, 0])


@pytest.mark.parametrize("n", [25, 24, 9, 4])
def test_hvt_pools_as_published(n):
    method, state = make("hvt", {"stages": 1}), state_for(n)
    (k,) = method.schedule(n, None, 1, 0)
    short = method.reduce(0, state, k)
    want = max_pool1d(state.hidden[:, 1:].transpose(1, 2), 3, 2).transpose(1, 2)
    assert torch.equal(short.hidden[:, 1:], want)
    assert short.source[0, 1:].tolist() == [2 * i + 1 for i in range(k)]
    # The last patch of an even number lies in no window.
    assert int((short.assignment < 0).sum()) == (0 if n % 2 else 2)
    if n % 2:
        assert torch.equal(short.hidden, make("hvt", {}).reduce(0, state, k).hidden)
        assert torch.equal(short.assignment, make("hvt", {}).reduce(0, state, k).assignment)


def test_hvt_pools_what_was_pooled():
    method, state = make("hvt", {"pooling": "average"}), state_for(16, b=1)
    once = method.reduce(0, state, 8)
    twice = method.reduce(3, once, 4)
    assert twice.mass.tolist() == [[1.0, 4.0, 4.0, 4.0, 4.0]]
    want = adaptive_avg_pool1d(state.hidden[:, 1:].transpose(1, 2), 4).transpose(1, 2)
    torch.testing.assert_close(twice.hidden[:, 1:], want)
    assert twice.assignment[0].tolist() == [1 + i // 4 for i in range(16)]


def test_hvt_schedules():
    published = create("hvt", stages=4).schedule(196, None, 12, 11)
    assert published == (97, 97, 97, 48, 48, 48, 23, 23, 23, 11, 11, 11)
    assert create("hvt", stages=1).schedule(196, None, 12, 11) == (97,) * 12
    assert create("hvt", stages=3, kernel=2).schedule(9, None, 3, 2) == (4, 2, 1)
    assert create("hvt", stages=3).schedule(4, None, 3, 2) == (1, 1, 1)
    assert create("hvt").schedule(576, 0.25, 24, 22) == (*[288] * 12, *[144] * 11)
    assert create("hvt", layers=(3,)).schedule(100, 0.1, 6, 4) == (100, 100, 100, 10, 10)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"pooling": "min"}, ConfigError, "one of max, average"),
        ({"stages": 0}, ConfigError, "at least 1"),
        ({"kernel": 1}, ConfigError, "at least 2"),
        ({"stages": 2, "layers": (1,)}, ConfigError, "leave one of"),
        ({"layers": (1.5,)}, ConfigError, "share of depth"),
        ({"stages": True}, ConfigTypeError, "must be an int"),
    ],
)
def test_hvt_options(options, error, match):
    with pytest.raises(error, match=match):
        create("hvt", **options)


@pytest.mark.parametrize(("name", "k"), [("token_clustering", 9), ("vomix", 9), ("hvt", 9)])
def test_half_precision_and_autocast(name, k):
    state = state_for(36)
    low = dataclasses.replace(state, hidden=state.hidden.bfloat16())
    method = make(name, {})
    assert method.reduce(4, low, k).hidden.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            method.reduce(4, state, k).hidden, method.reduce(4, state, k).hidden
        )
        inside = method.reduce(4, state, k)
    outside = method.reduce(4, state, k)
    assert torch.equal(inside.source, outside.source)
    torch.testing.assert_close(inside.hidden, outside.hidden)


def test_recipes_of_a_batch_are_those_of_its_units():
    method, state = make("token_clustering", {}), state_for(36, b=3)
    whole = method.reduce(3, state, 9).restored()
    for i in range(3):
        alone = method.reduce(3, unit(state, i), 9).restored()
        torch.testing.assert_close(alone.hidden[0], whole.hidden[i], rtol=0, atol=1e-5)
