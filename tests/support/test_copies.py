"""Copies, files and wrappers of a patched model."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch

from tests import tiny
from tests.support import same
from vlmcompress import UnsupportedModelError, handle_of, patch


@pytest.mark.support("copies: deepcopy while patched")
@same.THREE
def test_deepcopy(family):
    """A copy is patched by itself: same ids and logits, also after the first handle is removed."""
    model = tiny.build(family)
    call = same.mixed(model)
    full, handle = same.seen(model, call), patch(model, keep=same.KEEP)
    want, twin = same.seen(model, call), copy.deepcopy(model)
    handle.remove()
    same.assert_same(same.seen(twin, call), want)
    same.assert_same(same.seen(model, call), full)
    handle_of(twin).set(keep=1.0)
    same.assert_same(same.seen(twin, call), full)


@pytest.mark.support("copies: save_pretrained while patched")
@same.THREE
def test_save_pretrained(family, tmp_path):
    """What is loaded again is the unpatched model, and patched it is the patched one."""
    model = tiny.build(family)
    call = same.mixed(model)
    full = same.seen(model, call)
    with patch(model, keep=same.KEEP):
        want = same.seen(model, call)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    same.assert_same(same.seen(loaded, call), full)
    same.assert_same(same.patched(loaded, call), want)


@pytest.mark.support("copies: a `generate` that others set on the model")
@same.families("llava")
@torch.no_grad()
def test_other_generate(family):
    """Set before, it is called and comes back; wrapped around ours, it stays and works."""
    model = tiny.build(family)
    call = same.mixed(model)
    want, calls = same.patched(model, call), []

    def wrap(inner):
        @functools.wraps(inner)
        def generate(*args, **kwargs):
            calls.append(inner)
            return inner(*args, **kwargs)

        model.generate = generate
        return generate

    first = wrap(model.generate)
    same.assert_same(same.patched(model, call), want)
    assert len(calls) == 1
    assert model.generate is first
    handle = patch(model, keep=same.KEEP)
    second = wrap(model.generate)
    handle.remove()
    assert model.generate is second
    full = same.seen(model, call)
    same.assert_same(same.patched(model, call), want)
    same.assert_same(same.patched(model, call, keep=1.0), full)


@pytest.mark.support("copies: pickle of a patched model", refuses=True)
@same.families("llava")
def test_pickle(family):
    """`torch.save` of a whole patched model raises; after `remove()` it works."""
    model = tiny.build(family)
    with patch(model, keep=same.KEEP), pytest.raises(UnsupportedModelError, match="remove"):
        torch.save(model, io.BytesIO())
    torch.save(model, io.BytesIO())


@pytest.mark.support("DataParallel over several devices", refuses=True)
@same.families("llava")
def test_replicas(family):
    """A replica, as DataParallel makes one per device, raises and names the alternative."""
    model = tiny.build(family)
    with (
        patch(model, keep=same.KEEP),
        pytest.raises(UnsupportedModelError, match="DistributedDataParallel"),
    ):
        model._replicate_for_data_parallel()(**same.one(model))


@pytest.mark.support("patch of a DataParallel or DistributedDataParallel wrapper", refuses=True)
@same.families("llava")
def test_wrappers(family):
    """Patching the wrapper raises and says to patch the model inside."""
    with pytest.raises(UnsupportedModelError, match=r"model\.module"):
        patch(torch.nn.DataParallel(tiny.build(family)), keep=same.KEEP)
