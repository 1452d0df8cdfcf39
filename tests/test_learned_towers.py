"""T2T, SiT and Sparsifiner against their rules written out, on tensors alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.units import QUICK, seeds
from vlmcompress.core.errors import ConfigError, ConfigTypeError, EvidenceError
from vlmcompress.methods import create
from vlmcompress.methods.tower import sparsity
from vlmcompress.methods.tower.base import TowerAttention, TowerReducer, TowerState
from vlmcompress.methods.tower.shape import TowerShape
from vlmcompress.methods.tower.sit import SiT, Slimming, recalibration_loss
from vlmcompress.methods.tower.sparsifiner import Predictors, Sparsifiner, reconstruction_loss
from vlmcompress.methods.tower.sparsity import AttentionSparsifier
from vlmcompress.methods.tower.t2t import T2T, Projections, window_means

WIDTH, HEADS, HEAD = 12, 3, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state_of(side: int, b: int = 2, cls: int = 1, seed: int = 0) -> TowerState:
    return TowerState.whole(drawn(b, side * side + cls, WIDTH, seed=seed), cls, 6)


def shape_of(n: int, plan: tuple[int, ...], cls: int = 1) -> TowerShape:
    return TowerShape(WIDTH, HEAD, n, cls, 6, plan)


# --- T2T ------------------------------------------------------------------------------------------


def windows(side: int, stride: int, overlap: int) -> list[list[int]]:
    """Places along one side of each window."""
    left = math.ceil(overlap / 2)
    starts = range(-left, side - left, stride)
    return [[p for p in range(s, s + stride + overlap) if 0 <= p < side] for s in starts]


@QUICK
@given(
    side=st.integers(3, 9),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    overlap=st.integers(0, 4),
    seed=seeds,
)
def test_windows_are_means_of_the_patches_in_them(
    side: int, stride: tuple[int, int], overlap: int, seed: int
):
    x = drawn(2, 3, side, side, seed=seed)
    got = window_means(x, stride, overlap)
    rows, columns = (windows(side, length, overlap) for length in stride)
    assert got.shape == (2, 3, len(rows), len(columns))
    for i, across in enumerate(rows):
        for j, down in enumerate(columns):
            want = x[:, :, across][..., down].mean((2, 3))
            torch.testing.assert_close(got[:, :, i, j], want, rtol=1e-4, atol=1e-5)
    covered = {p for window in rows for p in window}
    assert covered == set(range(side))


def test_inner_windows_are_those_of_the_released_unfold():
    """Kernel 3, stride 2, padding 1, as in the paper's splits between tokens."""
    x = drawn(1, 4, 8, 8)
    unfolded = torch.nn.Unfold(kernel_size=3, stride=2, padding=1)(x)
    want = unfolded.unflatten(1, (4, 9)).mean(2).unflatten(2, (4, 4))
    got = window_means(x, (2, 2), 1)
    torch.testing.assert_close(got[..., 1:, 1:], want[..., 1:, 1:])
    torch.testing.assert_close(got[..., 0, 0] * 4, want[..., 0, 0] * 9)


def test_patches_belong_to_their_stride_and_rows_stay_in_order():
    method = T2T()
    assert method.tokens_kept(49, 0.35) == 16  # 17 asked for, strides of 2 x 2
    short = method.reduce(3, state_of(7), 16)
    owner = [(place // 7 // 2) * 4 + place % 7 // 2 for place in range(49)]
    assert short.assignment.tolist() == [[o + 1 for o in owner]] * 2
    assert short.mass[0].tolist() == [1.0] + [float(owner.count(i)) for i in range(16)]
    assert bool((short.source[:, 1:].diff() > 0).all())
    assert all(owner[p] == i for i, p in enumerate(short.source[0, 1:].tolist()))
    assert torch.equal(short.hidden[:, 0], state_of(7).hidden[:, 0])


def test_untrained_projections_add_nothing_and_trained_ones_their_window():
    side, overlap, state = 7, 1, state_of(7)
    method = T2T(learned=True, channels=5, overlap=overlap)
    parts = method.parts(shape_of(49, (49, 49, 49, 12)))
    assert isinstance(parts, Projections)
    state = dataclasses.replace(state, parts=parts)
    mean = T2T(overlap=overlap).reduce(3, state, 12)
    assert torch.equal(method.reduce(3, state, 12).hidden, mean.hidden)
    widen, narrow = parts.widen["3"], parts.narrow["3"]
    with torch.no_grad():
        widen.weight.copy_(drawn(*widen.weight.shape, seed=1))
        widen.bias.copy_(drawn(*widen.bias.shape, seed=2))
    added = method.reduce(3, state, 12).hidden - mean.hidden
    narrowed = (state.hidden[:, 1:] @ narrow.weight.T + narrow.bias).unflatten(1, (side, side))
    assert parts.config["strides"] == {"3": [2, 3]}
    for row in range(4):
        for column in range(3):
            want = widen.bias.expand(2, -1)
            weight = widen.weight.unflatten(1, (5, 3, 4))
            for i in range(3):
                for j in range(4):
                    y, x = row * 2 - 1 + i, column * 3 - 1 + j
                    if 0 <= y < side and 0 <= x < side:
                        want = want + narrowed[:, y, x] @ weight[:, :, i, j].T
            got = added[:, 1 + row * 3 + column]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(added[:, 0], torch.zeros(2, WIDTH))


def test_several_splits_of_their_own_strides():
    method = T2T(layers=(1, 3), strides=(3, 2))
    assert method.own_budget
    plan = method.schedule(64, None, 6, 4)
    assert plan == (64, 9, 9, 4, 4)
    once = method.reduce(1, state_of(8), 9)
    twice = method.reduce(3, once, 4)
    x = state_of(8).hidden[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
    want = window_means(window_means(x, (3, 3), 1), (2, 2), 1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(twice.hidden[:, 1:], want)
    assert twice.mass[0].sum() == 65
    # A share beyond what is read stands for the last layer; its stride is still the second.
    late = T2T(layers=(1, 0.9), strides=(3, 2))
    assert late.schedule(64, None, 6, 3) == (64, 9, 9, 4)
    assert torch.equal(late.reduce(3, once, 4).hidden, twice.hidden)


def test_gradients_reach_a_projection():
    method = T2T(learned=True)
    state = dataclasses.replace(state_of(6), parts=method.parts(shape_of(36, (36, 36, 36, 9))))
    method.reduce(3, state, 9).hidden.square().sum().backward()
    assert state.parts is not None
    grads = {name: p.grad for name, p in state.parts.named_parameters()}
    assert grads["widen.3.weight"] is not None
    assert grads["widen.3.weight"].abs().sum() > 0
    with torch.no_grad():
        state.parts.get_parameter("widen.3.weight").add_(0.1)
    method.reduce(3, state, 9).hidden.square().sum().backward()
    assert state.parts.get_parameter("narrow.3.weight").grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layers": (1, 2)}, ConfigError, "splits once by keep"),
        ({"strides": (2, 2)}, ConfigError, r"2 stride\(s\) for 1 layer"),
        ({"strides": (1,)}, ConfigError, "at least 2"),
        ({"strides": 2}, ConfigTypeError, "tuple of ints"),
        ({"strides": (2.0,)}, ConfigTypeError, "must be an int"),
        ({"overlap": -1}, ConfigError, "at least 0"),
        ({"channels": 0}, ConfigError, "at least 1"),
        ({"learned": 1}, ConfigTypeError, "True or False"),
        ({"seed": -1}, ConfigError, "at least 0"),
        ({"layers": ()}, ConfigError, "at least one layer"),
    ],
)
def test_options_of_t2t(options: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        create("t2t", **options)


def test_t2t_needs_a_square_and_layers_apart():
    with pytest.raises(ConfigError, match="square map of patches, and there are 12"):
        T2T().tokens_kept(12, 0.5)
    with pytest.raises(ConfigError, match="fall together"):
        T2T(layers=(0.8, 0.9), strides=(2, 2)).schedule(64, None, 6, 3)


# --- SiT ------------------------------------------------------------------------------------------


def slimming(n: int = 36, k: int = 10, **options: Any) -> tuple[SiT, Slimming]:
    method = SiT(**options)
    parts = method.parts(shape_of(n, (n, n, n, k)))
    with torch.no_grad():
        for i, parameter in enumerate(parts.parameters()):
            parameter.add_(drawn(*parameter.shape, seed=i))
    return method, parts


def test_slots_are_weighted_means_of_all_patches():
    method, parts = slimming()
    state = dataclasses.replace(state_of(6), parts=parts)
    short = method.reduce(3, state, 10)
    own = {name.removeprefix("slots.3."): value for name, value in parts.state_dict().items()}
    for image, x in zip(short.hidden, state.hidden, strict=True):
        rows = []
        for patch in x[1:]:
            normed = (patch - patch.mean()) / (patch.var(correction=0) + 1e-5).sqrt()
            inner = own["up.weight"] @ (normed * own["norm.weight"] + own["norm.bias"])
            inner = inner + own["up.bias"]
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            rows.append((own["down.weight"] @ inner + own["down.bias"]) * own["scale"])
        logits = torch.stack(rows)
        for slot in range(10):
            raised = (logits[:, slot] - logits[:, slot].max()).exp()
            weights = raised / raised.sum()
            want = sum(w * patch for w, patch in zip(weights, x[1:], strict=True))
            torch.testing.assert_close(image[1 + slot], want, rtol=1e-4, atol=1e-4)
        assert torch.equal(image[0], x[0])


def test_slots_keep_their_places_and_patches_go_where_they_weigh_most():
    method, parts = slimming()
    state = dataclasses.replace(state_of(6, b=3), parts=parts)
    short = method.reduce(3, state, 10)
    assert bool((short.source == short.source[0]).all())
    assert bool((short.source.diff(dim=1) > 0).all())
    weights = parts.weights(3, state.hidden[:, 1:])
    torch.testing.assert_close(weights.sum(2), torch.ones(3, 10))
    for i in range(3):
        for patch in range(36):
            slot = int(short.assignment[i, patch]) - 1
            if patch not in short.source[i].tolist():
                assert slot == int(weights[i, :, patch].argmax())


def test_published_counts():
    assert SiT(layers=(8, 11, 13), ratio=0.5).schedule(196, None, 16, 15)[::3] == (
        *(196, 196, 196, 98),
        *(49, 24),
    )
    assert SiT().schedule(576, 0.125, 16, 15)[-1] == 72
    assert SiT(ratio=0.01).schedule(16, None, 16, 15)[-1] == 1
    assert SiT().schedule(196, 0.125, 16, 15)[7:15] == (196, 99, 99, 99, 50, 50, 25, 25)


def test_slimming_is_reversed_and_learns_from_the_whole_tower():
    method, parts = slimming(reverse=True)
    x = drawn(4, 37, WIDTH)
    state = dataclasses.replace(TowerState.whole(x, 1, 6), parts=parts)
    optimiser = torch.optim.Adam(parts.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        slimmed = method.reduce(3, state, 10).hidden[:, 1:]
        loss = recalibration_loss(parts, slimmed, x[:, 1:].requires_grad_())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert parts.recalibrate(slimmed).shape == (4, 36, WIDTH)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.parameters())
    assert x.grad is None


def test_reverse_is_the_released_one():
    _, parts = slimming(reverse=True)
    own = {n.removeprefix("reverse."): v for n, v in parts.state_dict().items() if "reverse" in n}
    slimmed = drawn(2, 10, WIDTH)

    def perceptron(x: Tensor, name: str) -> Tensor:
        inner = x @ own[f"{name}.0.weight"].T + own[f"{name}.0.bias"]
        inner = torch.nn.functional.gelu(inner)
        return inner @ own[f"{name}.2.weight"].T + own[f"{name}.2.bias"]

    def norm(x: Tensor, i: int) -> Tensor:
        weight, bias = own[f"norms.{i}.weight"], own[f"norms.{i}.bias"]
        return torch.nn.functional.layer_norm(x, (WIDTH,), weight, bias)

    assert own["places.0.weight"].shape == (4 * 36, 10)
    x = perceptron(norm(slimmed, 0).transpose(1, 2), "places").transpose(1, 2)
    torch.testing.assert_close(parts.recalibrate(slimmed), x + perceptron(norm(x, 1), "channels"))


def test_what_sit_refuses():
    method, parts = slimming()
    state = dataclasses.replace(state_of(6), parts=parts)
    with pytest.raises(ConfigError, match="makes 10 tokens, and 9 are wanted"):
        method.reduce(3, state, 9)
    with pytest.raises(ConfigError, match="no module for layer 2, only for 3"):
        method.reduce(2, state, 10)
    with pytest.raises(EvidenceError, match=r"needs its trained parts \(Slimming\).*NoneType"):
        method.reduce(3, state_of(6), 10)
    with pytest.raises(ConfigError, match=r"sit\(reverse=True\)"):
        recalibration_loss(parts, drawn(1, 10, WIDTH), drawn(1, 36, WIDTH))
    with pytest.raises(ConfigTypeError, match="parts of 'sit', not by NoneType"):
        recalibration_loss(None, drawn(1, 10, WIDTH), drawn(1, 36, WIDTH))
    _, reversing = slimming(reverse=True)
    with pytest.raises(ConfigError, match="the whole tower gives"):
        recalibration_loss(reversing, drawn(1, 10, WIDTH), drawn(1, 37, WIDTH))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ratio": 0.0}, ConfigError, "ratio is 0"),
        ({"ratio": 1.5}, ConfigError, r"\[0, 1\]"),
        ({"hidden": 0}, ConfigError, "hidden is 0"),
        ({"hidden": "x"}, ConfigTypeError, "must be a number"),
        ({"reverse": 1}, ConfigTypeError, "True or False"),
        ({"seed": 0.5}, ConfigTypeError, "must be an int"),
        ({"layers": 3}, ConfigTypeError, "tuple of layers"),
    ],
)
def test_options_of_sit(options: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        create("sit", **options)


# --- Sparsifiner ----------------------------------------------------------------------------------


def attention_of(side: int = 6, b: int = 2, cls: int = 1, seed: int = 0) -> TowerAttention:
    q, k, v = drawn(3, b, HEADS, side * side + cls, HEAD, seed=seed)
    return TowerAttention(q, k, 0.5, v)


def predictors(n: int = 36, cls: int = 1, random: bool = True, **options: Any) -> Predictors:
    parts = Sparsifiner(**options).parts(shape_of(n, (n,) * 5, cls))
    if random:
        with torch.no_grad():
            for i, parameter in enumerate(parts.parameters()):
                parameter.add_(drawn(*parameter.shape, seed=i))
    return parts


def written_out(
    attention: TowerAttention, parts: Predictors, layer: int, k: int, cls: int
) -> tuple[Tensor, Tensor]:
    """Dense attention under a mask, and the mask, by loops over images, heads and queries."""
    own = {
        name.removeprefix(f"layers.{layer}."): value
        for name, value in parts.state_dict().items()
        if name.startswith(f"layers.{layer}.")
    }
    b, heads, n, _ = attention.q.shape
    mask = torch.zeros(b, heads, n, n, dtype=torch.bool)
    for i in range(b):
        for h in range(heads):
            narrow = attention.k[i, h] @ own["key.weight"].T + own["key.bias"]
            down = torch.stack(
                [sum(w * row for w, row in zip(ws, narrow, strict=True)) for ws in own["down"]]
            )
            for m in range(n):
                query = own["query.weight"] @ attention.q[i, h, m] + own["query.bias"]
                coefficients = (down @ query / math.sqrt(HEAD)).softmax(0)
                estimate = sum(
                    c * row.abs() for c, row in zip(coefficients, own["up"], strict=True)
                )
                best = sorted(range(n), key=lambda j, e=estimate: -e[j].item())[:k]
                mask[i, h, m, range(n) if m < cls else best] = True
    logits = attention.q @ attention.k.transpose(-1, -2) * attention.scale
    assert attention.v is not None
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ attention.v, mask


@pytest.mark.parametrize(("cls", "k"), [(1, 5), (0, 9), (1, 1)])
def test_sparse_attention_is_dense_attention_under_the_mask(cls: int, k: int):
    attention, parts = attention_of(cls=cls), predictors(cls=cls)
    got = Sparsifiner().attend(2, attention, k, cls, parts)
    want, mask = written_out(attention, parts, 2, k, cls)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert bool((mask[:, :, cls:].sum(-1) == k).all())
    assert cls == 0 or bool(mask[:, :, 0].all())


def test_untrained_queries_look_at_the_cells_whose_mean_key_they_meet_best():
    """With nothing narrowed: cells of 2 x 2 patches, and keys of a budget of two cells."""
    attention = attention_of(cls=0)
    parts = predictors(cls=0, random=False, rank=4, narrow=1)
    predictor = parts.of(0, 36)
    assert parts.config["rank"] == 9
    cell = torch.tensor([(p // 6 // 2) * 3 + p % 6 // 2 for p in range(36)])
    down = predictor.down_keys(attention.k)
    estimates = predictor.estimates(attention.q, down)
    means = torch.stack([attention.k[:, :, cell == c].mean(2) for c in range(9)], 2)
    shares = (attention.q @ means.transpose(-1, -2) / math.sqrt(HEAD)).softmax(-1)
    torch.testing.assert_close(estimates, shares[..., cell] / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("narrow", [1, 2])
def test_untrained_estimates_are_attention_where_keys_are_alike_in_cells(narrow: int):
    attention = attention_of(cls=0)
    cell = torch.tensor([(p // 6 // 2) * 3 + p % 6 // 2 for p in range(36)])
    first = torch.tensor([int((cell == c).nonzero()[0]) for c in range(9)])
    attention = dataclasses.replace(attention, k=attention.k[:, :, first[cell]])
    predictor = predictors(cls=0, random=False, rank=4, narrow=narrow).of(0, 36)
    estimates = predictor.estimates(attention.q, predictor.down_keys(attention.k))
    error = (estimates - attention.weights()).abs().max()
    assert error < 1e-5 if narrow == 1 else error > 1e-3
    torch.testing.assert_close(estimates.sum(-1), torch.ones(2, HEADS, 36))


def test_all_keys_is_attention():
    attention, parts = attention_of(), predictors()
    got = Sparsifiner().attend(0, attention, 37, 1, parts)
    assert attention.v is not None
    torch.testing.assert_close(got, attention.weights() @ attention.v, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor held."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.size = max(self.size, value.numel())
        return out


def test_no_map_of_all_queries_and_keys_is_held(monkeypatch: pytest.MonkeyPatch):
    attention, parts = attention_of(side=14), predictors(196)
    n = 197
    want = Sparsifiner().attend(0, attention, 20, 1, parts)
    monkeypatch.setattr(sparsity, "HELD", 1 << 15)
    with Largest() as largest:
        got = Sparsifiner().attend(0, attention, 20, 1, parts)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert largest.size <= 1 << 15 < 2 * HEADS * n * n


def test_batch_is_its_units_alone():
    attention, parts = attention_of(b=3), predictors()
    together = Sparsifiner().attend(1, attention, 7, 1, parts)
    for i in range(3):
        one = slice(i, i + 1)
        assert attention.v is not None
        alone = TowerAttention(attention.q[one], attention.k[one], 0.5, attention.v[one])
        got = Sparsifiner().attend(1, alone, 7, 1, parts)
        torch.testing.assert_close(got[0], together[i], rtol=1e-5, atol=1e-6)


def test_budgets_of_keys():
    method = Sparsifiner(layers=(0, -2))
    assert isinstance(method, AttentionSparsifier)
    assert method.tokens_kept(576, 0.1) == 576
    assert method.schedule(576, 0.25, 6, 4) == (576,) * 5
    assert method.connections(576, 0.25, 6, 4) == (144, 576, 576, 576, 144)
    assert Sparsifiner().connections(576, 50, 3, 1) == (50, 50)
    assert method.keys_kept(576, 10_000) == 576
    state = state_of(4)
    assert method.reduce(0, state, 16) is state
    with pytest.raises(ConfigError, match=r"no budget: write 'sparsifiner:0\.25'"):
        method.schedule(576, None, 6, 4)
    with pytest.raises(ConfigError, match="layer 5"):
        Sparsifiner(layers=(5,)).connections(576, 0.5, 6, 4)


def test_attention_has_gradients_and_its_choice_has_none():
    attention, parts = attention_of(), predictors()
    tensors = [attention.q, attention.k, attention.v]
    for tensor in tensors:
        assert tensor is not None
        tensor.requires_grad_()
    got = Sparsifiner().attend(0, attention, 6, 1, parts)
    want, _ = written_out(attention, parts, 0, 6, 1)
    grads = torch.autograd.grad(got.square().sum(), tensors)
    for a, b in zip(grads, torch.autograd.grad(want.square().sum(), tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in parts.parameters())


def test_predictors_learn_the_attention():
    """Keys that depend on their places, as a tower's do, are met better and better."""
    places = drawn(HEADS, 37, HEAD, seed=3) * 1.5
    attention = TowerAttention(
        places + 0.1 * drawn(2, HEADS, 37, HEAD), places.expand(2, -1, -1, -1), 0.5
    )
    parts = predictors(random=False)
    before = parts.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    optimiser = torch.optim.Adam(parts.of(0, 37).parameters(), lr=0.02)
    losses = []
    for _ in range(80):
        loss = reconstruction_loss(parts, 0, attention)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, value in parts.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("layers.0."))
    want = torch.nn.functional.mse_loss(
        parts.of(1, 37).reconstruction(attention.q[:, :, 1:], attention.k),
        attention.weights()[:, :, 1:],
    )
    torch.testing.assert_close(reconstruction_loss(parts, 1, attention), want)


def test_what_sparsifiner_refuses():
    attention, parts = attention_of(), predictors(layers=(0, 2))
    with pytest.raises(ConfigError, match="layers 0, 2 and images of 37 rows, not for layer 1"):
        Sparsifiner().attend(1, attention, 5, 1, parts)
    with pytest.raises(ConfigError, match="not for layer 0 and 26"):
        Sparsifiner().attend(0, attention_of(5), 5, 1, parts)
    with pytest.raises(EvidenceError, match="given NoneType"):
        Sparsifiner().attend(0, attention, 5, 1, None)
    with pytest.raises(ConfigTypeError, match="parts of 'sparsifiner', not by NoneType"):
        reconstruction_loss(None, 0, attention)
    with pytest.raises(ConfigError, match="square map of patches, and there are 35"):
        predictors(35)
    for options in ({"rank": 0}, {"narrow": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match="at least"):
            create("sparsifiner", **options)


@pytest.mark.parametrize("name", ["t2t", "sit", "sparsifiner"])
def test_options_round_trip_and_what_is_said_of_training(name: str):
    method = create(name, layers=(2,), seed=4)
    assert isinstance(method, TowerReducer)
    assert create(name, **method.options()) == method
    assert method.training_free == (name == "t2t")
    assert method.learns == (name != "t2t")
