"""What only a CUDA device can show."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from tests import tiny
from tests.seam import oracle
from tests.support import same
from vlmcompress import patch

pytestmark = pytest.mark.gpu


def on_device(model, call):
    """The call on the model's device, in its type."""
    moved = {name: value.to("cuda") for name, value in call.items()}
    return {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in moved.items()
    }


def hold(model, call, **options):
    """Keep all = unpatched, bit for bit; compressed calls run and return the caller's prompt."""
    full = same.seen(model, call, **options)
    same.assert_same(same.patched(model, call, keep=1.0, **options), full)
    got = same.patched(model, call, **options)
    assert torch.equal(got.ids[:, : call["input_ids"].shape[1]], call["input_ids"])
    return got


@pytest.mark.support("GPU: flash_attention_2")
@same.families("llava", "qwen2_vl")
def test_flash(family):
    """Keep all = unpatched bit for bit; kept tokens equal those under sdpa."""
    if not is_flash_attn_2_available():
        pytest.skip("needs the flash-attn package")
    kept = {}
    for kernel in ("sdpa", "flash_attention_2"):
        model = tiny.build(family, attn_implementation=kernel, dtype=torch.bfloat16).cuda()
        call = on_device(model, same.mixed(model))
        hold(model, call)
        with patch(model, "random", keep=same.KEEP) as handle, torch.no_grad():
            model(**call)
            kept[kernel] = torch.cat(handle.kept)
    assert torch.equal(kept["sdpa"], kept["flash_attention_2"])


@pytest.mark.support("GPU: device_map over GPU and CPU")
@same.families("llava", "qwen2_vl")
def test_device_map(family, tmp_path):
    """Ids and logits equal those of the model that lies on the GPU whole."""
    tiny.build(family).save_pretrained(tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path).eval().cuda()
    call = on_device(whole, same.mixed(whole))
    want = hold(whole, call)
    tower = f"model.{same.tower(whole)[0]}"
    places = {f"model.{name}": 0 for name, _ in whole.model.named_children()}
    split = AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map={**places, tower: "cpu", "lm_head": 0}
    ).eval()
    same.assert_same(hold(split, call), want, tolerance=1e-4)


@pytest.mark.support("GPU: static cache, decoding compiled by default")
@same.families("llava", "qwen2_vl")
def test_compiled_decoding(family):
    """Generates what patched greedy decoding does; keep all = unpatched."""
    model = tiny.build(family).cuda()
    call = on_device(model, same.one(model))
    got = hold(model, call, cache_implementation="static")
    assert torch.equal(got.ids, same.patched(model, call).ids)


@pytest.mark.support("GPU: offloaded cache")
@same.families("llava", "qwen2_vl")
def test_offloaded_cache(family):
    """Generates what patched greedy decoding does; keep all = unpatched."""
    model = tiny.build(family).cuda()
    call = on_device(model, same.one(model))
    got = hold(model, call, cache_implementation="offloaded")
    assert torch.equal(got.ids, same.patched(model, call).ids)


@pytest.mark.support("GPU: bitsandbytes 8-bit and 4-bit")
@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True}])
@same.families("llava")
def test_bitsandbytes(family, bits, tmp_path):
    """Keep all = unpatched bit for bit; compressed calls run."""
    pytest.importorskip("bitsandbytes")
    tiny.build(family, dtype=torch.float16).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path,
        dtype=torch.float16,
        quantization_config=BitsAndBytesConfig(**bits),
        device_map={"": 0},
    ).eval()
    hold(model, on_device(model, same.mixed(model)))


@pytest.mark.support("GPU: torch.compile of the vision tower (inductor)")
@same.families("llava", "qwen2_vl")
def test_inductor(family):
    """Logits within 1e-3 of those without; the same tokens are kept."""
    model = tiny.build(family).cuda()
    call = on_device(model, same.mixed(model))
    with patch(model, keep=same.KEEP) as handle, torch.no_grad():
        want, kept = model(**call).logits, handle.kept
    name, tower = same.tower(model)
    setattr(model.model, name, torch.compile(tower))
    with patch(model, keep=same.KEEP) as handle, torch.no_grad():
        assert (model(**call).logits - want).abs().max() < 1e-3
        assert all(torch.equal(a, b) for a, b in zip(handle.kept, kept, strict=True))


@pytest.mark.support("GPU: types and masks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@same.THREE
@torch.no_grad()
def test_types(family, dtype):
    """Keep all = unpatched bit for bit; dropped = masked-out tokens within rounding."""
    model = tiny.build(family, dtype=dtype)
    call = same.mixed(model)
    model = model.cuda()
    call = on_device(model, call)
    hold(model, call)
    with patch(model, keep=same.KEEP, positions="original") as handle:
        got, record = model(**call).logits, handle.last
    kept = [rows.cpu() for rows in record.kept]
    mask = oracle.drop_mask(model, call, kept, record.tokens_before)
    positions = oracle.default_positions(
        model.cpu(), {name: value.cpu() for name, value in call.items()}
    ).cuda()
    want = model.cuda()(**{**call, "attention_mask": mask, "position_ids": positions}).logits
    rows = mask.bool()
    error = (got - want)[rows].abs().max()
    assert error <= 6 * torch.finfo(dtype).eps * want[rows].abs().max()
