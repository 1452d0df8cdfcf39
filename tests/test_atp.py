"""ATP against its rule written out, on tensors alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.decoder_states import random_state, sample
from tests.units import QUICK, seeds
from vlmcompress.core.errors import CheckpointError, ConfigError, ConfigTypeError, EvidenceError
from vlmcompress.core.report import SoftMask
from vlmcompress.methods import create
from vlmcompress.methods.decoder.atp import ATP, Thresholds, budget_loss
from vlmcompress.methods.decoder.base import DecoderShape, DecoderState, Site

RAGGED = ((3, 12, 7), (0, 9, 4), (5, 20, 1))
ALL = torch.tensor([12, 9, 20])
SHAPE = DecoderShape(3, 8)
OPTIONS: dict[str, Any] = {"layers": (1, 2), "sample_rates": (1 / 16, 1 / 4)}


def learnt(method: ATP, seed: int = 0) -> Thresholds:
    """Heads with numbers that tell prompts apart."""
    parts, generator = method.parts(SHAPE), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return parts


def ready(method: ATP, seed: int = 0, **changes: Any) -> DecoderState:
    state = random_state(RAGGED, seed=seed)
    return dataclasses.replace(state, parts=learnt(method, seed), **changes)


def scaled(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def thresholds_of(parts: Thresholds, layer: int, means: list[float]) -> list[float]:
    """Both, by sums of products."""
    own = {k.removeprefix(f"heads.{layer}."): v.tolist() for k, v in parts.state_dict().items()}
    shared = [
        sum(w * m for w, m in zip(row, means, strict=True)) + b
        for row, b in zip(own["shared.weight"], own["shared.bias"], strict=True)
    ]
    found = []
    for name in ("redundant", "spatial"):
        (row,), (bias,) = own[f"{name}.weight"], own[f"{name}.bias"]
        logit = sum(w * s for w, s in zip(row, shared, strict=True)) + bias
        found.append(1 / (1 + math.exp(-logit)))
    return found


def margins(state: DecoderState, method: ATP, b: int, layer: int) -> dict[int, float]:
    """By how much each visual row of a sample is above a threshold, in loops."""
    attention = state.attended()
    q, k = attention.q[b], attention.k[b]
    visual = state.visual[b].nonzero()[:, 0].tolist()
    valid = state.valid[b].nonzero()[:, 0].tolist()
    text = [i for i in valid if i > visual[-1]]
    heads, group = len(q), len(q) // len(k)

    def logit(h: int, i: int, j: int) -> float:
        return float(q[h, i] @ k[h // group, j]) * attention.scale

    def softmax(h: int, i: int) -> dict[int, float]:
        seen = {j: math.exp(logit(h, i, j)) for j in valid if j <= i}
        return {j: value / sum(seen.values()) for j, value in seen.items()}

    rows = [softmax(h, i) for h in range(heads) for i in text]
    cross = [sum(row[v] for row in rows) / len(rows) for v in visual]
    own = [
        sum(logit(h, i, v) for h in range(heads) for i in visual) / (heads * len(visual))
        for v in visual
    ]
    if method.normalise:
        own, cross = scaled(own), scaled(cross)
    means = [sum(own) / len(own), sum(cross) / len(cross)]
    redundant, spatial = thresholds_of(state.learnt(Thresholds), layer, means)
    above = {}
    for i, v in enumerate(visual):
        on_grid = [0.0]
        for rate in method.sample_rates:
            stride = round(1 / math.sqrt(rate))
            if all(p % stride == stride // 2 for p in state.place[b, v].tolist()):
                on_grid.append(1 - method.lambda_sample * rate)
        above[v] = max((own[i] + cross[i]) / 2 - redundant, max(on_grid) - spatial)
    return above


@pytest.mark.parametrize("options", [{}, {"normalise": False}, {"sample_rates": ()}])
@QUICK
@given(seed=seeds, site=st.integers(0, 1))
def test_what_is_above_a_threshold_goes_on(options: dict[str, Any], seed: int, site: int):
    method = ATP(**{**OPTIONS, **options})
    state = ready(method, seed)
    reduction = method.reduce(site, state, ALL)
    assert reduction.soft is None
    assert bool((reduction.keep | state.visual).all())
    for b in range(len(RAGGED)):
        above = margins(state, method, b, site + 1)
        want = [v for v, margin in above.items() if margin > 0] or [max(above, key=above.get)]
        sure = [v for v, margin in above.items() if abs(margin) > 1e-5]
        got = (reduction.keep[b] & state.visual[b]).nonzero()[:, 0].tolist()
        assert [v for v in got if v in sure] == [v for v in want if v in sure]


@QUICK
@given(seed=seeds)
def test_soft_masks_are_the_larger_sigmoid(seed: int):
    method = ATP(**OPTIONS)
    state = ready(method, seed)
    hard = method.reduce(0, state, ALL)
    state.parts.train()
    soft = method.reduce(0, state, ALL)
    assert torch.equal(soft.keep, hard.keep)
    for b in range(len(RAGGED)):
        above = margins(state, method, b, 1)
        lone = not any(margin > 0 for margin in above.values())
        for v, margin in above.items():
            want = 1 / (1 + math.exp(-10 * margin))
            want = 1.0 if lone and hard.keep[b, v] else want
            assert soft.soft[b, v].exp().item() == pytest.approx(want, abs=1e-4)


def test_a_batch_is_its_samples():
    method = ATP(**OPTIONS)
    state = ready(method, 3)
    batch = method.reduce(0, state, ALL).keep
    for b in range(len(RAGGED)):
        alone = method.reduce(0, sample(state, b), ALL[b : b + 1]).keep
        assert torch.equal(alone[0], batch[b][state.valid[b]])


def biased(method: ATP, bias: float, grid: float = -100.0) -> Thresholds:
    """Thresholds of sigmoid(bias), whatever the prompt."""
    parts = method.parts(SHAPE)
    with torch.no_grad():
        for name, parameter in parts.named_parameters():
            value = bias if name.endswith("redundant.bias") else 0.0
            parameter.fill_(-grid if name.endswith("spatial.bias") else value)
    return parts


def test_one_token_at_least_goes_on_and_all_may():
    method = ATP(**OPTIONS)
    state = random_state(RAGGED, seed=1)
    none = method.reduce(0, dataclasses.replace(state, parts=biased(method, 100.0)), ALL)
    assert (none.keep & state.visual).sum(1).tolist() == [1, 1, 1]
    every = dataclasses.replace(state, parts=biased(method, 0.0, grid=100.0))
    low = dataclasses.replace(method, lambda_sample=0.0, sample_rates=(1.0,))
    assert bool(low.reduce(0, every, ALL).keep.all())
    text = dataclasses.replace(every, visual=torch.zeros_like(state.visual))
    assert bool(method.reduce(0, text, torch.zeros(3)).keep.all())


def test_equal_scores_keep_the_first():
    method = ATP(layers=(1, 2), sample_rates=())
    state = random_state(RAGGED, seed=1)
    attention = state.attended()
    flat = dataclasses.replace(attention, k=torch.zeros_like(attention.k))
    state = dataclasses.replace(state, attention=flat, parts=biased(method, 0.0))
    keep = method.reduce(0, state, ALL).keep & state.visual
    assert torch.equal(keep.long().argmax(1), state.visual.long().argmax(1))
    assert keep.sum(1).tolist() == [1, 1, 1]


def test_a_later_site_measures_what_dropping_would_have_left():
    """Faint rows take part in nothing that thresholds are compared with."""
    method = ATP(**OPTIONS)
    state = ready(method, 5)
    first = method.reduce(0, state, ALL).keep
    gone = state.visual & ~first
    assert bool(gone.any())
    attention = state.attended()
    bias = torch.where(gone, -1e9, 0.0)
    soft = dataclasses.replace(
        state, faint=gone, attention=dataclasses.replace(attention, bias=bias)
    )
    kept = method.reduce(1, soft, ALL).keep
    for b in range(len(RAGGED)):
        columns = first[b] & state.valid[b]
        left = {
            f.name: getattr(state, f.name)[b : b + 1, columns]
            for f in dataclasses.fields(state)
            if isinstance(getattr(state, f.name), Tensor)
        }
        cut = dataclasses.replace(
            attention,
            q=attention.q[b : b + 1, :, columns],
            k=attention.k[b : b + 1, :, columns],
            seen=attention.seen[b : b + 1, columns],
        )
        hard = method.reduce(1, dataclasses.replace(state, **left, attention=cut), ALL[:1])
        assert torch.equal(hard.keep[0], kept[b][columns])


def test_answers_do_not_ask():
    method = ATP(**OPTIONS)
    state = ready(method, 2)
    answers = torch.zeros_like(state.visual)
    columns = state.visual.shape[1]
    answers[0, columns - 4] = True  # three of its seven text rows are labels
    asked = method.queries(dataclasses.replace(state, answers=answers))
    assert asked[0].tolist()[:4] == list(range(columns - 7, columns - 3))
    without = dataclasses.replace(state, answers=torch.zeros_like(answers))
    assert torch.equal(method.queries(without), method.queries(state))
    attention = state.attended()
    q = attention.q.clone()
    q[0, :, -3:] += 5
    other = dataclasses.replace(state, answers=answers)
    moved = dataclasses.replace(other, attention=dataclasses.replace(attention, q=q))
    assert torch.equal(method.reduce(0, moved, ALL).keep, method.reduce(0, other, ALL).keep)


def test_gradients_reach_every_head():
    method = ATP(**OPTIONS)
    state = ready(method, 4)
    state.parts.train()
    for site in range(2):
        soft = method.reduce(site, state, ALL).soft
        assert soft is not None
        soft[state.visual].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in state.parts.parameters())


# --- the budget -----------------------------------------------------------------------------------


def masks_of(*kept: tuple[int, int], n: int = 8) -> list[SoftMask]:
    """Of two samples of n tokens, with weights of one half."""
    visual = torch.ones(2, n, dtype=torch.bool)
    columns = torch.arange(n)
    return [
        SoftMask(
            layer,
            torch.full((2, n), 0.5, requires_grad=True),
            columns < torch.tensor(counts)[:, None],
            visual,
        )
        for layer, counts in zip((1, 3), kept, strict=True)
    ]


def test_the_budget_counts_what_would_be_kept():
    masks = masks_of((4, 8), (2, 2))
    # Layer 0 has all, 1 and 2 have 6 of 8 on average, 3 has 2.
    average = (1 + 2 * 6 / 8 + 2 / 8) / 4
    late = 6 / 8 * 1 + 2 / 8 * 3
    loss = budget_loss(masks, 4, 0.5, lambda_atp=0.3, lambda_target=2.0)
    assert loss.item() == pytest.approx(0.3 * late + 2.0 * 8 * (average - 0.5))
    loss.backward()
    for mask, share in zip(masks, (0.3 * 1 + 2 * 8 * 2 / 4, 0.3 * 3 + 2 * 8 / 4), strict=True):
        torch.testing.assert_close(mask.weights.grad, torch.full((2, 8), share / 16))


def test_samples_without_images_do_not_count():
    masks = masks_of((4, 8), (2, 2))
    bare = [
        dataclasses.replace(
            mask,
            weights=torch.cat([mask.weights, torch.zeros(1, 8)]),
            kept=torch.cat([mask.kept, torch.zeros(1, 8, dtype=torch.bool)]),
            visual=torch.cat([mask.visual, torch.zeros(1, 8, dtype=torch.bool)]),
        )
        for mask in masks
    ]
    assert budget_loss(bare, 4, 0.5).item() == pytest.approx(budget_loss(masks, 4, 0.5).item())


def test_budgets_that_cannot_be():
    with pytest.raises(ConfigError, match=r"parts\.train"):
        budget_loss([], 4, 0.5)
    with pytest.raises(ConfigError, match=r"between 0\.250 and 1"):
        budget_loss(masks_of((4, 8), (2, 2)), 4, 0.25)


# --- options and files ----------------------------------------------------------------------------


def test_places_in_the_published_model():
    assert ATP().sites(32) == (Site(4), Site(14), Site(24))
    assert ATP().sites(8) == (Site(1), Site(4), Site(6))
    assert ATP().counts(576, None, 32) == (576, 576, 576)
    assert ATP().own_budget
    assert not ATP().training_free


def test_grids_of_a_square():
    state = random_state(((0, 20, 1),))
    score = ATP(sample_rates=(1 / 16, 1 / 4)).spatial(state)[0]
    table = score[:20].reshape(4, 5)
    assert table[2, 2] == pytest.approx(1 - 3 / 16)
    assert table[1::2, 1::2].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert int((table > 0).sum()) == 5
    assert score[20] == 0


def test_files_keep_what_they_were_made_for(tmp_path: Path):
    method, path = ATP(**OPTIONS), tmp_path / "atp.safetensors"
    parts = learnt(method)
    parts.save(path)
    loaded = dataclasses.replace(method, weights=str(path)).parts(SHAPE)
    assert all(
        torch.equal(a, b) for a, b in zip(parts.parameters(), loaded.parameters(), strict=True)
    )
    assert not loaded.training
    for options in ({"layers": (2,)}, {"width": 3}, {"normalise": False}, {"sample_rates": ()}):
        other = ATP(**{**OPTIONS, **options, "weights": str(path)})
        with pytest.raises(ConfigError, match="made for"):
            other.parts(SHAPE)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:-40])
    for name in (str(broken), str(tmp_path / "nowhere.safetensors")):
        with pytest.raises(CheckpointError, match="no usable weights"):
            ATP(**OPTIONS, weights=name).parts(SHAPE)


def test_heads_are_drawn_from_their_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (ATP(seed=s).parts(DecoderShape(32, 8)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    first = [next(iter(parts.parameters())) for parts in (one, same, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_what_is_missing_is_said():
    method = ATP(**OPTIONS)
    state = random_state(RAGGED)
    with pytest.raises(EvidenceError, match=r"needs its trained parts \(Thresholds\).*NoneType"):
        method.reduce(0, state, ALL)
    with pytest.raises(EvidenceError, match="attention"):
        method.reduce(0, ready(method, attention=None), ALL)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layers": ()}, ConfigError, "at least one layer"),
        ({"layers": 3}, ConfigTypeError, "tuple of layers"),
        ({"sample_rates": 0.25}, ConfigTypeError, "tuple of rates"),
        ({"sample_rates": (0.0,)}, ConfigError, "sample_rate is 0"),
        ({"sample_rates": (2.0,)}, ConfigError, r"lie in \[0, 1\]"),
        ({"lambda_sample": -1.0}, ConfigError, "lambda_sample"),
        ({"temperature": 0.0}, ConfigError, "temperature is 0"),
        ({"temperature": float("nan")}, ConfigError, "finite"),
        ({"normalise": 1}, ConfigTypeError, "normalise"),
        ({"width": 0}, ConfigError, "width"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"weights": 3}, ConfigTypeError, "safetensors"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        create("atp", **options)


def test_options_round_trip():
    method = ATP(**OPTIONS, weights="somewhere", width=3)
    assert create("atp", **method.options()) == method
