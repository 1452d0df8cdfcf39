"""Methods inside the tower that learn, and those that look at fewer keys, in models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.seam import equalities, matrix, oracle, plain_learned, plain_tower
from tests.seam.equalities import world
from tests.seam.plain_learned import shake
from tests.seam.test_tower import blocks, connector_input
from vlmcompress import (
    ConfigError,
    UnsupportedInputError,
    UnsupportedModelError,
    patch,
)
from vlmcompress.core.errors import CheckpointError
from vlmcompress.families import family_of
from vlmcompress.methods import create
from vlmcompress.methods.tower.base import TowerAttention
from vlmcompress.methods.tower.sit import recalibration_loss
from vlmcompress.methods.tower.sparsifiner import reconstruction_loss

FAMILIES = ("llava", "llava_siglip", "paligemma")
LEARNED = ("t2t(learned=True)", "sit", "sparsifiner")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_learned = pytest.mark.parametrize("spec", LEARNED)
kernels = pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention", "fake_flash"])


def shaken(model: Any, spec: Any, keep: Any = 0.4, **more: Any) -> Any:
    handle = patch(model, spec, keep=keep, **more)
    shake(handle.parts)
    return handle


# --- equal to what is written out -----------------------------------------------------------------


@kernels
@every_family
@torch.no_grad()
def test_t2t_equals_one_written_out(family, kernel):
    w, cls = world(family, kernel), int(family == "llava")
    call = w.inputs(oracle.MIXED)
    got, record = connector_input(w.model, call, "t2t(overlap=2)", keep=0.4)
    rule = plain_learned.t2t(cls, 5, (1, 3), 2)
    _compare(w, call, rule, got, record)


@kernels
@every_family
@torch.no_grad()
def test_sit_equals_one_written_out(family, kernel):
    w, cls = world(family, kernel), int(family == "llava")
    call = w.inputs(oracle.MIXED)
    handle = shaken(w.model, "sit")
    weights = {name: value.clone() for name, value in handle.parts.state_dict().items()}
    got = _connector_input(w.model, call)
    record = handle.last
    handle.remove()
    _compare(w, call, plain_learned.sit(cls, weights), got, record)


def _connector_input(model: Any, call: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    connector = family_of(model).connector(model.base_model)
    hook = connector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(**call)
    hook.remove()
    return seen[0]


def _compare(w: Any, call: Any, rule: Any, got: Tensor, record: Any) -> None:
    pixels = call["pixel_values"]
    want = plain_tower.run(
        w.model, pixels, rule, record.tower_patches, weighed=False, place="after"
    )
    assert record.tokens_after == (10, 10, 10)
    for image, rows in enumerate(want):
        torch.testing.assert_close(got[image], rows.x, rtol=1e-4, atol=1e-5)
        assert record.kept[image].tolist() == rows.source
        members = [(record.assignments[image] == i).nonzero()[:, 0].tolist() for i in range(10)]
        assert members == rows.members


@kernels
@every_family
@torch.no_grad()
def test_sparsifiner_equals_one_written_out(family, kernel):
    w = world(family, kernel)
    call = w.inputs(oracle.MIXED)
    with shaken(w.model, "sparsifiner(rank=4)") as handle:
        weights = {name: value.clone() for name, value in handle.parts.state_dict().items()}
        got, record = _connector_input(w.model, call), handle.last
    assert record.tower_patches == ()
    assert set(record.tower_keys) == {10}
    assert record.tokens_after == record.tokens_before == (25, 25, 25)
    last = len(record.tower_keys) - 1
    want = plain_learned.sparse(w.model, call["pixel_values"], weights, 10, last)
    got = got[:, -25:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_that_are_left_alone_run_on_the_models_own_kernel():
    w = world("llava")
    with patch(w.model, "sparsifiner(layers=(1, 3))", keep=6) as handle:
        w.model(**w.call)
        assert handle.last.tower_keys == (25, 6, 25, 6, 25)
        assert "keys of a query in each tower layer: 25, 6, 25, 6, 25" in str(handle.report)
        assert list(handle.parts.layers) == ["1", "3"]


# --- what every one promises ----------------------------------------------------------------------


@every_learned
@every_family
@torch.no_grad()
def test_keeping_all_is_the_unpatched_model_bit_for_bit(family, spec):
    w = world(family)
    for keep in (1.0, 25, 10_000):
        with patch(w.model, spec, keep=keep) as handle:
            assert torch.equal(w.model(**w.call).logits, w.logits)
            assert torch.equal(w.generate(w.call).sequences, w.ids)
            assert handle.last.tower_patches == handle.last.tower_keys == ()


@every_learned
@every_family
@torch.no_grad()
def test_a_batch_equals_its_samples(family, spec):
    w = world(family)
    with patch(w.model, f"{spec}:0.6 | uniform:0.5") as handle:
        shake(handle.parts)
        together = w.generate(w.call)
        equalities._compare_with_singles(w, handle, together, handle.last.kept)


@pytest.mark.parametrize("spec", ["sparsifiner", "sit"])
@torch.no_grad()
def test_generate_with_and_without_cache(spec):
    w = world("llava")
    with shaken(w.model, spec):
        cached = w.generate(w.call, tokens=4)
        ids = w.generate(w.call, tokens=4, use_cache=False)
        assert torch.equal(cached.sequences, ids.sequences)
        logits = torch.stack(cached.logits) - torch.stack(ids.logits)
        assert logits.abs().max() < 1e-4
    assert not torch.equal(cached.logits[0], w.generate(w.call).logits[0])


@every_learned
@torch.no_grad()
def test_nothing_is_left_on_the_model(spec):
    w = world("llava")
    keys, names = list(w.model.state_dict()), [n for n, _ in w.model.named_modules()]
    handle = patch(w.model, "uniform", keep=0.5)
    handle.set(method=spec, keep=0.5)
    parts = handle.parts
    assert list(w.model.state_dict()) == keys
    assert [n for n, _ in w.model.named_modules()] == names
    assert not {id(p) for p in parts.parameters()} & {id(p) for p in w.model.parameters()}
    w.model(**w.call)
    with handle.disabled():
        assert torch.equal(w.model(**w.call).logits, w.logits)
    handle.set(method="tome_tower", keep=0.6)
    assert handle.parts is None
    w.model(**w.call)
    handle.set(method=spec, keep=0.5)
    w.model(**w.call)
    handle.remove()
    assert equalities.traces(w.model) == []
    assert torch.equal(w.model(**w.call).logits, w.logits)


@every_learned
@torch.no_grad()
def test_copies_have_parts_of_their_own(spec):
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    handle = shaken(model, spec)
    before = model(**call).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**call).logits, before)
    shake(handle.parts, seed=1)
    assert not torch.equal(model(**call).logits, before)
    assert torch.equal(twin(**call).logits, before)


@every_learned
@pytest.mark.parametrize("dtype", matrix.LOW)
@every_family
@torch.no_grad()
def test_half_precision(family, dtype, spec):
    w = world(family, "sdpa", dtype)
    with shaken(w.model, spec) as handle:
        logits = w.model(**w.call).logits
        assert logits.dtype == w.dtype
        assert logits.isfinite().all()
        assert all(p.dtype == torch.float32 for p in handle.parts.parameters())


# --- files ----------------------------------------------------------------------------------------


@every_learned
@torch.no_grad()
def test_saved_and_loaded_they_answer_the_same(spec, tmp_path: Path):
    w, path = world("llava"), tmp_path / "parts.safetensors"
    with shaken(w.model, spec) as handle:
        want = w.model(**w.call).logits
        handle.parts.save(path)
    option = f"weights='{path}'"
    loaded = spec[:-1] + f", {option})" if spec.endswith(")") else f"{spec}({option})"
    with patch(w.model, loaded, keep=0.4) as handle:
        assert torch.equal(w.model(**w.call).logits, want)
        handle.set(keep=1.0)
        assert torch.equal(w.model(**w.call).logits, w.logits)
        handle.set(keep=0.4)
        assert torch.equal(w.model(**w.call).logits, want)


@torch.no_grad()
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path):
    model, path = tiny.build("llava"), tmp_path / "parts.safetensors"
    with patch(model, "sit", keep=0.4) as handle:
        handle.parts.save(path)
    spec = f"sit(weights='{path}')"
    with pytest.raises(ConfigError, match=r"made for slots .* give the options and the budget"):
        patch(model, spec, keep=0.6)
    assert equalities.traces(model) == []
    with pytest.raises(CheckpointError, match="nowhere"):
        patch(model, "sparsifiner(weights='nowhere.safetensors')", keep=0.4)
    assert equalities.traces(model) == []
    call = tiny.inputs(model, oracle.ONE)
    with patch(model, spec, keep=0.4) as handle:
        before, parts = model(**call).logits, handle.parts
        with pytest.raises(ConfigError, match="made for"):
            handle.set(keep=0.6)
        path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="no usable weights"):
            handle.set(method=f"sit(weights='{path}', seed=1)", keep=0.4)
        assert handle.parts is parts
        assert torch.equal(model(**call).logits, before)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["t2t(learned=True)", "sit"])
def test_parts_train_through_the_model(spec):
    model = tiny.build("llava").requires_grad_(False)
    call = tiny.inputs(model, oracle.MIXED)
    call["labels"] = call["input_ids"].clone()
    with patch(model, spec, keep=0.4) as handle:
        parts = handle.parts
        optimiser = torch.optim.Adam(parts.parameters(), lr=0.02)
        losses = []
        for _ in range(25):
            loss = model(**call).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        # A constant that is added to the logits of all patches changes no softmax over them.
        still = {n for n, p in parts.named_parameters() if not p.grad.abs().sum() > 1e-7}
        assert all(name.endswith("down.bias") for name in still)
        handle.set(keep=1.0)
        handle.set(keep=0.4)
        assert handle.parts is parts
        handle.set(positions="contiguous")
        assert handle.parts is parts
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad is None for p in model.parameters())


def test_slimming_learns_from_the_whole_tower():
    """What leaves the slimmed tower is made to tell what leaves the whole one."""
    model = tiny.build("llava").requires_grad_(False)
    call = tiny.inputs(model, oracle.MIXED)
    dense = _connector_input(model, call).detach()
    with patch(model, "sit(reverse=True)", keep=0.4) as handle:
        optimiser = torch.optim.Adam(handle.parts.parameters(), lr=0.01)
        losses = []
        for _ in range(20):
            loss = recalibration_loss(handle.parts, _connector_input(model, call), dense)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert handle.parts.slots["3"].up.weight.grad.abs().sum() > 0


def test_predictors_learn_a_towers_attention():
    model = tiny.build("llava").requires_grad_(False)
    call = tiny.inputs(model, oracle.MIXED)
    attention = blocks(model)[2].self_attn
    made: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda m, args, out, name=name: made.update({name: out})
        )
        for name in ("q_proj", "k_proj")
    ]
    model(**call)
    for hook in hooks:
        hook.remove()
    q, k = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in made.values())
    seen = TowerAttention(q, k, attention.scale)
    with patch(model, "sparsifiner", keep=0.4) as handle:
        before = model(**call).logits
        optimiser = torch.optim.Adam(handle.parts.parameters(), lr=0.02)
        losses = []
        for _ in range(40):
            loss = reconstruction_loss(handle.parts, 2, seen)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert not torch.equal(model(**call).logits, before)


def test_gradients_reach_the_pixels_past_chosen_keys():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    call["pixel_values"] = call["pixel_values"].requires_grad_()
    with patch(model, "sparsifiner", keep=0.4) as handle:
        model(**call).logits.sum().backward()
        assert all(p.grad is None for p in handle.parts.parameters())
    assert call["pixel_values"].grad.abs().sum() > 0
    for block in blocks(model)[:5]:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            assert getattr(block.self_attn, name).weight.grad.abs().sum() > 0


# --- pipelines and other models -------------------------------------------------------------------


@torch.no_grad()
def test_keys_are_chosen_before_tokens_are():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.MIXED)
    with patch(model, ["sparsifiner:0.4", "fastervlm"], keep=0.2) as handle:
        model(**call)
        assert handle.last.tokens_after == (5, 5, 5)
        assert set(handle.last.tower_keys) == {10}
        assert handle.config.to_spec() == "sparsifiner:0.4 | fastervlm:0.2"
        # What is read of the tower is what its queries and keys say, connected or not.
        assert all(0 < len(rows) <= 25 for rows in handle.kept)


@pytest.mark.parametrize("family", ["vipllava", "aya_vision", "llava_next", "llava_onevision"])
@torch.no_grad()
def test_sparse_attention_goes_where_rows_cannot(family):
    """Connectors that count rows, read several layers or tiles are given all they know."""
    w = world(family)
    with patch(w.model, "sparsifiner", keep=0.4) as handle:
        logits = w.model(**w.call).logits
        assert handle.last.tokens_after == handle.last.tokens_before
        assert handle.last.tower_keys
        assert logits.shape == w.logits.shape
        assert not torch.equal(logits, w.logits)
        handle.set(keep=1.0)
        assert torch.equal(w.model(**w.call).logits, w.logits)


@pytest.mark.parametrize("family", ["llava_pixtral", "qwen2_vl", "qwen2_5_vl", "glm4v", "kimi_k25"])
def test_packed_towers_are_refused(family):
    model = tiny.build(family)
    with pytest.raises(UnsupportedModelError, match="acts inside the tower"):
        patch(model, "sparsifiner", keep=0.5)
    assert equalities.traces(model) == []


def test_settings_that_make_no_sense():
    model = tiny.build("llava")
    for spec, keep, match in (
        ("sparsifiner", None, "has no budget"),
        ("sparsifiner", "auto", "inside it"),
        ("sparsifiner(layers=(-1,))", 0.5, "output of layer 4"),
        ("sit(ratio=0.5)", 0.5, "says twice"),
        ("t2t(strides=(2,))", 0.5, "says twice"),
        ("sit", None, "has no budget"),
    ):
        with pytest.raises(ConfigError, match=match):
            patch(model, spec, keep=keep)
    with patch(model, "sit(ratio=0.5)") as handle:
        assert [*handle.parts.config["slots"].values()] == [12, 6]
    assert create("sparsifiner").stage == "tower"


@torch.no_grad()
def test_a_tower_that_masks_keys_itself_is_refused():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    attention = blocks(model)[0].self_attn

    def masked(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": torch.zeros(1, 1, 26, 26)}

    hook = attention.register_forward_pre_hook(masked, with_kwargs=True)
    with (
        patch(model, "sparsifiner", keep=0.4),
        pytest.raises(UnsupportedInputError, match="this vision tower masks"),
    ):
        model(**call)
    hook.remove()
