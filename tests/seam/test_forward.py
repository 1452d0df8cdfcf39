"""Plain forwards: logits' length, labels and gradients, masks, argument styles."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests import tiny
from tests.seam import oracle
from tests.seam.use_equalities import checkpoint
from tests.tiny import Prompt
from vlmcompress import patch

FAMILIES = ("llava", "vipllava", "paligemma", "qwen2_vl", "aya_vision")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny.build(request.param)


def labelled(model, padding="right"):
    call = tiny.inputs(model, oracle.MIXED, padding=padding)
    labels = call["input_ids"].clone()
    text = call["attention_mask"].bool() & (labels < 100)
    # The first text token after an image is a prompt token in every chat format.
    after_image = torch.roll(labels == model.config.image_token_id, 1, 1)
    labels[~text | after_image] = -100
    labels[torch.arange(len(labels)), call["attention_mask"].argmax(1)] = -100
    return {**call, "labels": labels}


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_loss_equals_one_computed_outside_on_restored_logits(model, padding, positions):
    call = labelled(model, padding)
    with patch(model, keep=0.25, positions=positions):
        out = model(**call)
    assert out.logits.shape[:2] == call["input_ids"].shape
    outside = cross_entropy(
        out.logits[:, :-1].flatten(0, 1), call["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert torch.isfinite(out.loss)
    assert torch.allclose(out.loss, outside, atol=1e-6)


def test_gradients_reach_tower_and_kept_features(model):
    call = labelled(model)
    model.zero_grad()
    with patch(model, keep=0.25):
        model(**call).loss.backward()
    tower = [
        p.grad for name, p in model.named_parameters() if "visual" in name or "vision_tower" in name
    ]
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in tower) > len(tower) // 2
    model.zero_grad()


def test_pooled_features_get_gradients(model):
    call = labelled(model)
    with patch(model, "pool", keep=0.25) as handle:
        features = handle.encode(**call)["image"].pooler_output
    assert all(f.requires_grad for f in features)


def test_gradient_checkpointing_gives_the_same_loss_and_gradients(model):
    call = labelled(model)
    trained = copy.deepcopy(model).train()
    with patch(trained, keep=0.25):
        plain = trained(**call).loss
        plain.backward()
        want = {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}
        trained.zero_grad()
        checkpoint(trained)
        loss = trained(**call, use_cache=False).loss
        loss.backward()
    assert torch.allclose(loss, plain, atol=1e-6)
    for name, parameter in trained.named_parameters():
        if name in want and want[name].abs().max() > 0:
            assert torch.allclose(parameter.grad, want[name], atol=1e-5), name


@torch.no_grad()
def test_packed_sequence_trap_is_sprung_by_nobody(model):
    """Gapped positions without mask and cache would be read as several packed sequences."""
    call = tiny.inputs(model, oracle.ONE)
    rest = {k: v for k, v in call.items() if k != "attention_mask"}
    with patch(model, keep=0.25, positions="original"):
        with_mask = model(**call, use_cache=False).logits
        assert (model(**rest, use_cache=False).logits - with_mask).abs().max() < 1e-5


@torch.no_grad()
def test_logits_to_keep_means_the_callers_columns(model):
    call = tiny.inputs(model, oracle.MIXED)
    with patch(model, keep=0.25):
        full = model(**call).logits
        assert (model(**call, logits_to_keep=1).logits - full[:, -1:]).abs().max() < 1e-5
        assert (model(**call, logits_to_keep=4).logits - full[:, -4:]).abs().max() < 1e-5
        some = torch.tensor([0, 9, full.shape[1] - 2])
        assert (model(**call, logits_to_keep=some).logits - full[:, some]).abs().max() < 1e-5


@torch.no_grad()
def test_short_logits_and_their_index(model):
    call = tiny.inputs(model, oracle.ONE)
    with patch(model, keep=0.25) as handle:
        full = model(**call).logits
    with patch(model, keep=0.25, restore_length=False) as handle:
        short = model(**call).logits
        index = handle.last.token_index
    assert short.shape[1] == index.shape[1] < full.shape[1]
    assert torch.equal(full[0, index[0]], short[0])


@torch.no_grad()
def test_positional_arguments_and_tuples(model):
    call = tiny.inputs(model, oracle.ONE)
    rest = {k: v for k, v in call.items() if k != "input_ids"}
    with patch(model, keep=0.25):
        want = model(**call).logits
        assert torch.equal(model(call["input_ids"], **rest).logits, want)
        assert torch.equal(model(**call, return_dict=False)[0], want)


@torch.no_grad()
def test_text_only_calls_are_the_unpatched_models(model):
    call = tiny.inputs(model, [Prompt(images=0, text=9), Prompt(images=0, text=5)])
    logits, ids = model(**call).logits, model.generate(**call, **oracle.greedy(model))
    with patch(model, keep=0.25) as handle:
        assert torch.equal(model(**call).logits, logits)
        assert torch.equal(model.generate(**call, **oracle.greedy(model)), ids)
        assert handle.last is None
        assert "no call carried an image" in str(handle.report)


@torch.no_grad()
def test_a_four_dimensional_mask_is_cut_on_both_axes():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    length = call["input_ids"].shape[1]
    square = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    with patch(model, keep=0.25):
        want = model(**call).logits
        got = model(**{**call, "attention_mask": square}).logits
    assert (got - want).abs().max() < 1e-5


@torch.no_grad()
def test_ragged_grids_are_grouped():
    for family in ("qwen2_vl", "qwen2_5_vl", "glm4v", "kimi_k25", "llava_pixtral"):
        model = tiny.build(family)
        sizes = [(8, 12), (8, 8), (12, 8)]
        call = tiny.inputs(model, oracle.MIXED, image_sizes=sizes)
        with patch(model, keep=0.5, positions="original") as handle:
            got = model(**call).logits
            record = handle.last
        assert len(set(record.tokens_before)) > 1
        want = oracle.masked_logits(model, call, record.kept, record.tokens_before)
        seen = oracle.drop_mask(model, call, record.kept, record.tokens_before).bool()
        assert (got - want)[seen].abs().max() < 1e-5


@torch.no_grad()
def test_foreign_encodings_are_used_as_they_are_and_say_so(model):
    call = tiny.inputs(model, oracle.ONE)
    want = model(**call).logits
    output = oracle.encode(model, call)
    rest = {k: v for k, v in call.items() if k != "pixel_values"}
    with patch(model, keep=0.25), pytest.warns(UserWarning, match=r"handle\.encode"):
        got = model(**rest, mm_encoder_outputs={"image": output}).logits
    assert (got - want).abs().max() < 1e-5


@torch.no_grad()
def test_a_suspended_patch_says_nothing_of_encodings(model, recwarn):
    call = tiny.inputs(model, oracle.ONE)
    output = oracle.encode(model, call)
    rest = {k: v for k, v in call.items() if k != "pixel_values"}
    with patch(model, keep=0.25) as handle, handle.disabled():
        model(**rest, mm_encoder_outputs={"image": output})
    assert not recwarn.list
