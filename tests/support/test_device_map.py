"""Weights that lie elsewhere and are fetched for each layer."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from tests import tiny
from tests.support import same
from vlmcompress import patch

CPU = torch.device("cpu")


def on_disk(model, folder):
    """Tower and language model dispatched, the tower's weights on disk."""
    places = {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
    places |= {f"model.{same.tower(model)[0]}": "disk", "lm_head": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def hold(model, family, dispatch, *, patch_first):
    """Patched = patched without offload; keep all and removed = unpatched; `encode` works."""
    plain = tiny.build(family)
    call = same.mixed(plain)
    want, full = same.patched(plain, call), same.seen(plain, call)
    if not patch_first:
        dispatch(model)
    handle = patch(model, keep=same.KEEP)
    if patch_first:
        dispatch(model)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    same.assert_same(same.seen(model, call), want)
    handle.encode(**call)
    handle.set(keep=1.0)
    same.assert_same(same.seen(model, call), full)
    handle.remove()
    same.assert_same(same.seen(model, call), full)


@pytest.mark.support("device_map: CPU offload")
@pytest.mark.parametrize("patch_first", [False, True])
@same.THREE
def test_offloaded_to_cpu(family, patch_first):
    """Patched before or after: ids and logits bit for bit as without; keep all = unpatched."""
    hold(tiny.build(family), family, lambda m: cpu_offload(m, CPU), patch_first=patch_first)


@pytest.mark.support("device_map: disk offload")
@pytest.mark.parametrize("patch_first", [False, True])
@same.THREE
def test_offloaded_to_disk(family, patch_first, tmp_path):
    """Patched before or after: ids and logits bit for bit as without; keep all = unpatched."""
    hold(tiny.build(family), family, lambda m: on_disk(m, tmp_path), patch_first=patch_first)


@pytest.mark.support("device_map: conversation that was begun uncompressed")
@same.families("llava", "qwen2_vl")
@torch.no_grad()
def test_a_later_image_over_a_plain_cache(family):
    """A later image over an uncompressed cache gives the logits of the model without offload."""

    def later_image(model):
        call = same.one(model)
        first = tiny.inputs(model, [tiny.Prompt(images=0, text=6)])
        cache = model(**first, use_cache=True).past_key_values
        mask = torch.cat([first["attention_mask"], call["attention_mask"]], 1)
        with patch(model, keep=same.KEEP):
            return model(**{**call, "attention_mask": mask}, past_key_values=cache).logits

    want = later_image(tiny.build(family))
    model = tiny.build(family)
    cpu_offload(model, CPU)
    assert torch.equal(later_image(model), want)
