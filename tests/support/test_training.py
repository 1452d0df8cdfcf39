"""Adapters, losses and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import SGD
from transformers import Trainer, TrainingArguments

from tests import tiny
from tests.seam.use_equalities import checkpoint
from tests.support import same
from vlmcompress import patch

# peft asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

ON_LLM = r".*language_model.*\.(q|v)_proj"
ON_TOWER = r".*(vision_tower|visual).*(q_proj|v_proj|qkv)$"


def adapted(model, where, **options):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules=where, **options)).eval()


def gradients(model, call):
    """Loss, and the gradients of everything that can learn."""
    model.zero_grad()
    loss = model(**call).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_equal_gradients(got, want, tolerance=1e-5):
    assert torch.allclose(got[0], want[0], atol=1e-6)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert torch.allclose(got[1][name], gradient, atol=tolerance), name


@pytest.mark.support("PEFT: LoRA on the language model, forward and generate")
@pytest.mark.parametrize("patch_first", [False, True])
@same.THREE
def test_lora(family, patch_first):
    """Ids and logits equal those of the merged weights, patched; keep all = unpatched adapter."""
    model = tiny.build(family)
    call = same.mixed(model)
    handle = patch(model, keep=same.KEEP) if patch_first else None
    peft = adapted(model, ON_LLM, init_lora_weights=False)
    handle = handle or patch(peft, keep=same.KEEP)
    got = same.seen(peft, call)
    handle.set(keep=1.0)
    everything = same.seen(peft, call)
    handle.remove()
    same.assert_same(everything, same.seen(peft, call))
    merged = peft.merge_and_unload()
    same.assert_same(got, same.patched(merged, call), tolerance=1e-5)


@pytest.mark.support("PEFT: LoRA on the language model, loss and backward")
@same.THREE
def test_lora_training(family):
    """Keep all: loss and gradients of the unpatched adapter; compressed: every adapter learns."""
    model = tiny.build(family)
    call = same.labelled(same.mixed(model))
    peft = adapted(model, ON_LLM, init_lora_weights=False)
    want = gradients(peft, call)
    with patch(peft, keep=1.0) as handle:
        assert_equal_gradients(gradients(peft, call), want)
        handle.set(keep=same.KEEP)
        _, learned = gradients(peft, call)
    assert learned.keys() == want[1].keys()
    assert all(gradient.abs().sum() > 0 for gradient in learned.values())


@pytest.mark.support("PEFT: LoRA on the vision tower, after patching")
@same.THREE
def test_lora_on_the_tower(family):
    """Evidence is read through the adapter: fresh adapters keep the same tokens and logits."""
    model = tiny.build(family)
    call = same.mixed(model)
    with patch(model, keep=same.KEEP) as handle:
        want = same.seen(model, call)
        kept = handle.kept
        peft = adapted(model, ON_TOWER)
        same.assert_same(same.seen(peft, call), want)
        assert all(torch.equal(a, b) for a, b in zip(handle.kept, kept, strict=True))
        _, learned = gradients(peft, same.labelled(call))
    assert any(gradient.abs().sum() > 0 for gradient in learned.values())


@pytest.mark.support("gradient checkpointing")
@same.THREE
def test_gradient_checkpointing(family):
    """Loss and gradients equal those without, patched; keep all = unpatched."""
    model = tiny.build(family).train()
    call = {**same.labelled(same.mixed(model)), "use_cache": False}
    with patch(model, keep=same.KEEP):
        want = gradients(model, call)
    checkpoint(model)
    full = gradients(model, call)
    with patch(model, keep=same.KEEP) as handle:
        assert_equal_gradients(gradients(model, call), want)
        handle.set(keep=1.0)
        assert_equal_gradients(gradients(model, call), full)


@pytest.mark.support("transformers.Trainer")
@same.families("llava", "qwen2_vl")
def test_trainer(family, tmp_path):
    """Two steps leave the weights of a hand-written loop; keep all = unpatched training."""
    call = same.labelled(same.mixed(tiny.build(family)))
    options = {
        "max_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 1,
    }

    def trained(keep):
        model = tiny.build(family).train()
        if keep is not None:
            patch(model, keep=keep)
        Trainer(
            model,
            TrainingArguments(str(tmp_path), **options),
            train_dataset=[{}, {}],
            data_collator=lambda rows: copy.copy(call),
            optimizers=(SGD(model.parameters(), lr=0.1), None),
        ).train()
        return model.state_dict()

    def by_hand():
        model = tiny.build(family).train()
        optimiser = SGD(model.parameters(), lr=0.1)
        with patch(model, keep=same.KEEP):
            for _ in range(2):
                optimiser.zero_grad()
                model(**call).loss.backward()
                optimiser.step()
        return model.state_dict()

    def assert_equal(got, want):
        assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in want)

    assert_equal(trained(same.KEEP), by_hand())
    assert_equal(trained(1.0), trained(None))
