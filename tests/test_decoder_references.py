"""Methods inside the language model against plain ones, written down from their definitions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.decoder_states import random_state, sample
from vlmcompress.methods import create
from vlmcompress.methods.decoder import attending
from vlmcompress.methods.decoder.base import DecoderState, LayerReducer, Reduction
from vlmcompress.methods.decoder.fitprune import FitPrune
from vlmcompress.methods.decoder.prunevid_llm import PruneVidLLM
from vlmcompress.methods.decoder.recycling import Recycling
from vlmcompress.methods.decoder.sparsevlm import SparseVLM
from vlmcompress.methods.decoder.topv import TopV, evenly
from vlmcompress.methods.decoder.uniform_layer import threshold
from vlmcompress.methods.ops.density import density_peaks

RAGGED = ((3, 12, 7), (0, 9, 4), (5, 20, 1), (2, 31, 40))
BUDGETS = torch.tensor([5, 3, 11, 17])


def make(name: str, **options: Any) -> Any:
    method = create(name, **options)
    assert isinstance(method, LayerReducer)
    return method


def attention_map(state: DecoderState) -> np.ndarray:
    """[heads, L, L] softmax of a sample without padding, in float64."""
    a = state.attended()
    q, k = a.q[0].double().numpy(), a.k[0].double().numpy().repeat(2, axis=0)
    logits = q @ k.transpose(0, 2, 1) * a.scale
    logits[:, ~np.tri(logits.shape[1], dtype=bool)] = -np.inf
    weights: np.ndarray = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def top(scores: np.ndarray, among: np.ndarray, k: int) -> list[int]:
    """The k best of some rows, ascending."""
    rows = np.flatnonzero(among)
    return sorted(rows[np.argsort(-scores[rows], kind="stable")[:k]].tolist())


def one(state: DecoderState, b: int) -> tuple[DecoderState, np.ndarray, np.ndarray]:
    """A sample alone, with its visual and text rows."""
    alone = sample(state, b)
    return alone, alone.visual[0].numpy(), alone.text[0].numpy()


def kept_rows(reduction: Reduction, state: DecoderState, b: int) -> list[int]:
    """Visual rows that stay, counted without padding."""
    padding = int((~state.valid[b]).sum())
    return ((reduction.keep & state.visual)[b].nonzero()[:, 0] - padding).tolist()


every_sample = pytest.mark.parametrize("b", range(len(RAGGED)))


@every_sample
@pytest.mark.parametrize("name", ["fastv", "vscan_llm", "pyramiddrop", "holitom_llm"])
def test_the_last_row_decides(name: str, b: int):
    state = random_state(RAGGED, seed=b)
    reduction = make(name).reduce(0, state, BUDGETS)
    alone, visual, _ = one(state, b)
    scores = attention_map(alone).mean(0)[-1]
    assert kept_rows(reduction, state, b) == top(scores, visual, int(BUDGETS[b]))


def bayer(size: int) -> np.ndarray:
    """Ordered dithering by its recursion."""
    if size == 1:
        return np.zeros((1, 1), dtype=int)
    half = 4 * bayer(size // 2)
    return np.block([[half, half + 2], [half + 3, half + 1]])


def test_thresholds_are_those_of_ordered_dithering():
    places = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij"), -1)
    found = threshold(places).numpy()
    assert (found.ravel().argsort() == bayer(16).ravel().argsort()).all()


def uniform_state(images: int, grid: tuple[int, int]) -> DecoderState:
    from tests.decoder_states import state_of

    n = grid[0] * grid[1]
    visual = torch.ones(1, images * n, dtype=torch.bool)
    unit = torch.arange(images).repeat_interleave(n)[None]
    return state_of(torch.zeros(1, images * n, 1), visual, images=unit, grid=grid)


def test_uniform_keeps_every_second_row_and_column():
    state = uniform_state(1, (8, 8))
    keep = make("uniform_layer").reduce(0, state, torch.tensor([16])).keep.view(8, 8)
    even = torch.zeros(8, 8, dtype=torch.bool)
    even[::2, ::2] = True
    assert torch.equal(keep, even)


@pytest.mark.parametrize("images", [1, 2, 3, 5])
@pytest.mark.parametrize("grid", [(24, 24), (5, 7), (1, 12)])
def test_uniform_is_nested_and_fair(images: int, grid: tuple[int, int]):
    state, n = uniform_state(images, grid), grid[0] * grid[1]
    before = torch.ones(images * n, dtype=torch.bool)
    for k in range(images * n, 0, -max(1, images * n // 50)):
        keep = make("uniform_layer").reduce(0, state, torch.tensor([k])).keep[0]
        assert keep.sum() == k
        assert (before | ~keep).all()
        shares = keep.view(images, n).sum(1)
        assert shares.max() - shares.min() <= 1
        before = keep


def test_tokens_without_a_place_are_thinned_out_in_turn():
    state = dataclasses.replace(
        uniform_state(1, (8, 8)),
        grid=torch.ones(1, 64, 2, dtype=torch.int64),
        place=torch.zeros(1, 64, 2, dtype=torch.int64),
    )
    keep = make("uniform_layer").reduce(0, state, torch.tensor([16])).keep[0]
    assert keep.nonzero()[:, 0].tolist() == list(range(0, 64, 4))


# SparseVLM ----------------------------------------------------------------------------------------


def plain_raters(state: DecoderState, visual: np.ndarray, text: np.ndarray) -> list[int]:
    embedded = state.embedded[0].double().numpy()
    rows = np.flatnonzero(text)
    received = np.zeros(len(rows))
    for v in np.flatnonzero(visual):
        match = np.exp(embedded[rows] @ embedded[v])
        received += match / match.sum()
    above = rows[received > received.mean() * (1 + 1e-9)]
    return (above if len(above) else rows).tolist()


def plain_peaks(x: np.ndarray, k: int) -> tuple[list[int], list[int]]:
    """Centres and the centre of every row, by their definition."""
    n = len(x)
    apart = np.array([[np.linalg.norm(a - b) for b in x] for a in x]) / math.sqrt(x.shape[1])
    density = [math.exp(-float(np.mean(sorted(row**2)[:k]))) for row in apart]
    peaks = []
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        peaks.append(density[i] * min((apart[i, j] for j in denser), default=apart.max()))
    centres = sorted(range(n), key=lambda i: (-peaks[i], i))[:k]
    groups = [min(range(k), key=lambda c: (apart[i, centres[c]], c)) for i in range(n)]
    for c, i in enumerate(centres):
        groups[i] = c
    return centres, groups


SIZES, CLUSTERS = (13, 1, 7, 10), torch.tensor([4, 1, 7, 2])
THERE = torch.arange(13) < torch.tensor(SIZES)[:, None]


@pytest.mark.parametrize("seed", range(5))
def test_peaks_of_density(seed: int):
    x = np.random.default_rng(seed).normal(size=(4, 13, 3)).astype(np.float32)
    centres, group = density_peaks(torch.from_numpy(x), CLUSTERS, THERE)
    for b, n in enumerate(SIZES):
        want = plain_peaks(x[b, :n].astype(np.float64), int(CLUSTERS[b]))
        assert centres[b, : CLUSTERS[b]].tolist() == want[0]
        assert group[b, :n].tolist() == want[1]
        assert (group[b, n:] == -1).all()


@pytest.mark.parametrize("seed", range(5))
def test_peaks_among_equal_rows(seed: int):
    x = torch.randint(-1, 2, (4, 13, 2), generator=torch.Generator().manual_seed(seed)).float()
    centres, group = density_peaks(x, CLUSTERS, THERE)
    for b, n in enumerate(SIZES):
        mine = centres[b, : CLUSTERS[b]].tolist()
        assert len(set(mine)) == CLUSTERS[b]
        assert group[b, mine].tolist() == list(range(CLUSTERS[b]))
        assert set(group[b, :n].tolist()) == set(range(CLUSTERS[b]))
    assert all(map(torch.equal, density_peaks(x, CLUSTERS, THERE), (centres, group)))


@pytest.mark.parametrize(("share", "per"), [(0.3, 10), (1.0, 1), (0.5, 3), (0.0, 10)])
def test_kept_and_merged_make_the_total(share: float, per: int):
    recycling = Recycling(share, per)
    for n in range(1, 120):
        for total in range(1, n + 1):
            kept = recycling.kept(n, total)
            assert 1 <= kept <= total
            clusters = recycling.clusters(n - kept)
            assert kept == 1 or kept + clusters == total
            assert total - kept <= clusters
            if kept < total:  # one more would be too many
                assert kept + 1 + recycling.clusters(n - kept - 1) > total


@every_sample
@pytest.mark.parametrize("version", [1, 2])
def test_sparsevlm(b: int, version: int):
    state = random_state(RAGGED, seed=b)
    method = make("sparsevlm", version=version, heads=3, recycled=0.6, per_cluster=3)
    assert isinstance(method, SparseVLM)
    reduction = method.reduce(0, state, BUDGETS)
    alone, visual, text = one(state, b)
    rows = attention_map(alone)[:, plain_raters(alone, visual, text)]
    if version == 2:
        loud = rows[:, :, visual].sum((1, 2))
        rows = rows[np.argsort(-loud, kind="stable")[:3]]
    scores = rows.mean((0, 1))
    n, total = int(visual.sum()), int(BUDGETS[b])
    kept = total if version == 2 else Recycling(0.6, 3).kept(n, total)
    want = top(scores, visual, kept)
    assert kept_rows(reduction, state, b) == want
    if version == 2:
        assert reduction.merged is None
        return
    dropped = [row for row in np.flatnonzero(visual).tolist() if row not in want]
    pool = sorted(dropped, key=lambda row: -scores[row])[: int(0.6 * len(dropped)) + 1]
    x = alone.hidden[0].double().numpy()[pool]
    centres, groups = plain_peaks(x, total - kept)
    means = [x[[g == c for g in groups]].mean(0) for c in range(total - kept)]
    there = reduction.merged_valid[b]
    np.testing.assert_allclose(reduction.merged[b][there], means, atol=1e-5)
    padding = int((~state.valid[b]).sum())
    assert (reduction.source[b][there] - padding).tolist() == [pool[c] for c in centres]


def test_sparsevlm_remembers_its_raters():
    state = random_state(RAGGED, seed=3)
    method = make("sparsevlm", layers=(1, 2))
    first = method.reduce(0, state, BUDGETS)
    later = dataclasses.replace(state, notes=first.notes, embedded=None)
    assert torch.equal(method.reduce(1, later, BUDGETS).keep, first.keep)
    assert not first.notes[state.visual].any()


def test_sparsevlm_without_text_behind_the_image_asks_the_last_row():
    state = random_state(((4, 15, 0),), seed=1)
    reduction = make("sparsevlm", version=2, heads=1.0).reduce(0, state, torch.tensor([6]))
    alone, visual, _ = one(state, 0)
    assert kept_rows(reduction, state, 0) == top(attention_map(alone).mean(0)[-1], visual, 6)


def test_sparsevlm_of_a_published_table():
    method = make("sparsevlm", table=64)
    assert method.count_kind == "exact"
    # 576 - 66 dropped, int(0.3 * 510) + 1 = 154 pooled, 16 clusters; and so on.
    assert method.counts(576, None, 32) == (66 + 16, 30 + 2, 17 + 1)
    assert make("sparsevlm", table=192, version=2).counts(576, None, 32) == (300, 200, 118)
    assert make("sparsevlm", table=64, version=2).counts(20, None, 32) == (19, 18, 17)
    assert make("sparsevlm", table=64).counts(1, None, 32) == (1, 1, 1)
    state = random_state(((3, 100, 9),), seed=1)
    counts = make("sparsevlm", table=(60, 30, 5)).counts(100, None, 32)
    reduction = make("sparsevlm", table=(60, 30, 5)).reduce(0, state, torch.tensor(counts[:1]))
    assert len(kept_rows(reduction, state, 0)) == 60
    assert reduction.merged_valid.sum() == counts[0] - 60 == 2


@every_sample
def test_sparsevlm_by_rank(b: int):
    state = random_state(RAGGED, seed=b)
    method = make("sparsevlm", rank=(1.5, 2.0), recycled=0.0)
    assert method.count_kind == "content"
    assert method.counts(40, None, 32) == (39, 38, 37)
    alone, visual, text = one(state, b)
    rows = attention_map(alone)[:, plain_raters(alone, visual, text)].mean(0)
    rank = np.linalg.matrix_rank(rows[:, visual].astype(np.float32))
    n = int(visual.sum())
    kept = n if rank == n else min(int(rank * 1.5 + 2), n - 1)
    assert kept_rows(method.reduce(0, state, BUDGETS), state, b) == top(rows.mean(0), visual, kept)


# The others ---------------------------------------------------------------------------------------


@every_sample
@pytest.mark.parametrize("at_a_time", [1, 10**6])
def test_fitprune(b: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attending.in_blocks, "__defaults__", (at_a_time,))
    state = random_state(RAGGED, seed=b)
    method = make("fitprune")
    assert isinstance(method, FitPrune)
    alone, visual, text = one(state, b)
    strongest = attention_map(alone).max(0)
    scores = strongest[visual].sum(0) * strongest[text].sum(0)
    padding = int((~state.valid[b]).sum())
    found = method.score(state)[b, padding:]
    np.testing.assert_allclose(found[alone.visual[0]], scores[visual], rtol=1e-4)
    assert kept_rows(method.reduce(0, state, BUDGETS), state, b) == top(
        scores, visual, int(BUDGETS[b])
    )


@every_sample
@pytest.mark.parametrize("faithful", [False, True])
def test_holitom_merges_what_goes(b: int, faithful: bool):
    state = random_state(RAGGED, seed=b)
    reduction = make("holitom_llm", faithful=faithful).reduce(0, state, BUDGETS)
    alone, visual, _ = one(state, b)
    hidden = alone.hidden[0].double().numpy()
    units = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    kept = kept_rows(reduction, state, b)
    groups: dict[int, list[int]] = {row: [] for row in kept}
    for row in np.flatnonzero(visual).tolist():
        if row not in groups:
            groups[max(kept, key=lambda r: units[r] @ units[row])].append(row)
    want = hidden.copy()
    for row, joining in groups.items():
        if faithful:
            for other in joining:
                want[row] = (want[row] + hidden[other]) / 2
        else:
            want[row] = hidden[[row, *joining]].mean(0)
    stays = reduction.keep[b] & state.valid[b]
    padding = int((~state.valid[b]).sum())
    np.testing.assert_allclose(
        reduction.hidden[b, padding:][stays[padding:]], want[stays[padding:]], atol=1e-5
    )


@every_sample
def test_prunevid_keeps_the_same_share_of_every_image(b: int):
    state = random_state(RAGGED, seed=b)
    method = make("prunevid_llm")
    assert isinstance(method, PruneVidLLM)
    reduction = method.reduce(0, state, BUDGETS)
    assert reduction.crop_earlier
    assert not make("prunevid_llm", crop=False).reduce(0, state, BUDGETS).crop_earlier
    alone, visual, text = one(state, b)
    scores, total = attention_map(alone)[:, text].max((0, 1)), int(BUDGETS[b])
    unit = alone.unit[0].numpy()
    first, second = sorted(set(unit[visual].tolist()))
    sizes = [int((unit == i).sum()) for i in (first, second)]
    exact = [total * size / sum(sizes) for size in sizes]
    share = round(exact[0]) if exact[0] % 1 != 0.5 else int(exact[0]) + 1
    want = top(scores, unit == first, share) + top(scores, unit == second, total - share)
    assert kept_rows(reduction, state, b) == sorted(want)


def plain_importance(method: TopV, state: DecoderState, rows: np.ndarray) -> np.ndarray:
    """Sinkhorn's iterations on the kernel itself, for the rows of one image."""
    place, grid = state.place[0].numpy()[rows], state.grid[0].numpy()[rows][0]
    before, after = (x[0].double().numpy()[rows] for x in (state.earlier, state.hidden))
    kernel, n = np.zeros((len(rows), len(rows))), len(rows)
    diagonal = np.linalg.norm(grid)
    for i in range(n):
        for j in range(n):
            cosine = before[i] @ after[j] / np.linalg.norm(before[i]) / np.linalg.norm(after[j])
            apart = np.linalg.norm(place[i] - place[j]) / diagonal
            centre = np.linalg.norm(place[i] - (grid - 1) / 2) / diagonal
            cost = 1 - cosine + method.spatial * apart + method.central * centre
            kernel[i, j] = math.exp(-cost / method.smoothing)
    u, power = np.ones(n), method.strictness / (method.strictness + method.smoothing)
    for _ in range(method.iterations):
        v = 1 / (kernel.T @ u)
        u = (kernel @ v) ** -power
    return u * (kernel @ (1 / (kernel.T @ u)))


@every_sample
@pytest.mark.parametrize("strictness", [0.0, 0.3])
def test_topv(b: int, strictness: float):
    state = random_state(RAGGED, seed=b)
    method = make("topv", spatial=0.7, central=0.4, strictness=strictness, recovered=0.25)
    alone, visual, _ = one(state, b)
    unit, importance = alone.unit[0].numpy(), np.zeros(len(visual))
    for image in set(unit[visual].tolist()):
        rows = np.flatnonzero(unit == image)
        importance[rows] = plain_importance(method, alone, rows)
    padding = int((~state.valid[b]).sum())
    found = method.importance(state)[b, padding:]
    np.testing.assert_allclose(found, importance, rtol=1e-3, atol=1e-6)
    assert importance.sum() == pytest.approx(visual.sum())
    total = int(BUDGETS[b])
    sampled = total // 4
    want = top(importance, visual, total - sampled)
    rest = [row for row in np.flatnonzero(visual).tolist() if row not in want]
    want += [rest[(2 * i + 1) * len(rest) // (2 * sampled)] for i in range(sampled)]
    assert kept_rows(method.reduce(0, state, BUDGETS), state, b) == sorted(want)


def test_with_strict_sources_all_would_send_alike():
    state = random_state(RAGGED, seed=1)
    importance = make("topv", strictness=1e5, iterations=300).importance(state)[state.visual]
    torch.testing.assert_close(importance, torch.ones_like(importance), atol=0.02, rtol=0)


def test_even_samples():
    for n in range(1, 40):
        among = torch.zeros(1, 2 * n + 3, dtype=torch.bool)
        among[0, 1 : 2 * n : 2] = True
        for k in range(n + 1):
            got = evenly(among, torch.tensor([k]))[0].nonzero()[:, 0].tolist()
            assert got == [1 + 2 * ((2 * i + 1) * n // (2 * k)) for i in range(k)]
