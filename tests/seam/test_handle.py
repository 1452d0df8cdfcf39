"""The handle: report, set, disabled, overlay, copies, saving, PEFT, pipelines."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from tests import tiny
from tests.seam import oracle
from vlmcompress import (
    AlreadyPatchedError,
    CompressionConfig,
    UnsupportedInputError,
    VLMCompressError,
    handle_of,
    patch,
)
from vlmcompress.methods import create


@pytest.fixture
def model():
    return tiny.build("llava")


@pytest.fixture
def call(model):
    return tiny.inputs(model, oracle.ONE)


@torch.no_grad()
def test_report_says_what_happened(model, call):
    handle = patch(model, keep=0.25)
    assert "nothing has been compressed yet" in str(handle.report)
    with pytest.raises(VLMCompressError, match="call the model first"):
        _ = handle.kept
    model(**call, use_cache=True)
    text = str(handle.report)
    assert text.startswith("25 -> 6 tokens/image")
    for part in (
        "vtc_cls:0.25",
        "contiguous",
        "KV cache",
        "FLOPs",
        "layers read: 2, 3, 4",
        "skipped",
        "time: ",
    ):
        assert part in text, part
    assert handle.last.prefill_flops < handle.last.prefill_flops_before
    assert set(handle.last.times) == {"tower", "evidence", "selection", "connector", "prefill"}
    assert all(seconds >= 0 for seconds in handle.last.times.values())
    with pytest.raises(AttributeError):
        handle.last.method = "other"


@torch.no_grad()
def test_set_sweeps_and_keeps_the_rest(model, call):
    handle = patch(model, "random", keep=0.5, seed=1)
    model(**call)
    first = handle.kept[0]
    handle.set(seed=2)
    model(**call)
    assert not torch.equal(handle.kept[0], first)
    handle.set(seed=1)
    model(**call)
    assert torch.equal(handle.kept[0], first)
    handle.set(keep=3)
    model(**call)
    assert handle.last.tokens_after == (3,)
    handle.set(method="fastervlm")
    model(**call)
    assert handle.last.tokens_after == (3,)
    assert handle.config.to_spec() == "fastervlm:3"
    handle.set(method="fastervlm:0.4", positions="original")
    model(**call)
    assert (handle.last.tokens_after, handle.last.positions) == ((10,), "original")
    before = handle.config
    with pytest.raises(VLMCompressError):
        handle.set(keep=-1)
    assert handle.config == before


@torch.no_grad()
def test_disabled_is_unpatched_and_nests(model, call):
    logits = model(**call).logits
    with patch(model, keep=0.25) as handle:
        with handle.disabled(), handle.disabled():
            assert torch.equal(model(**call).logits, logits)
        assert not torch.equal(model(**call).logits, logits)


def test_patching_twice_raises_and_says_how_to_take_it_off(model):
    with patch(model, keep=0.25):
        with pytest.raises(AlreadyPatchedError, match=r"remove\(\)"):
            patch(model, keep=0.5)
        assert handle_of(model).config.to_spec() == "vtc_cls:0.25"
    with pytest.raises(VLMCompressError, match="not patched"):
        handle_of(model)


@torch.no_grad()
def test_a_copy_has_its_own_patch(model, call):
    handle = patch(model, keep=0.25)
    twin = copy.deepcopy(model)
    handle.set(keep=0.5)
    want = model.generate(**call, **oracle.greedy(model))
    twin_out = twin.generate(**call, **oracle.greedy(twin))
    assert handle_of(twin).last.tokens_after == (6,)
    assert handle.last.tokens_after == (13,) or handle.last.tokens_after == (12,)
    handle.remove()
    assert torch.equal(twin.generate(**call, **oracle.greedy(twin)), twin_out)
    handle_of(twin).remove()
    assert torch.equal(twin(**call).logits, model(**call).logits)
    assert want.shape == twin_out.shape


@torch.no_grad()
def test_saving_while_patched_saves_the_model_alone(model, call, tmp_path):
    want = model(**call).logits
    with patch(model, keep=0.25):
        model.save_pretrained(tmp_path)
    assert torch.equal(
        LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()(**call).logits, want
    )
    assert not list(tmp_path.glob("vlmcompress*"))


# peft asks transformers by a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_peft_models_before_and_after(model, call):
    config = LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj", init_lora_weights=False)
    peft = get_peft_model(model, config).eval()
    with patch(peft, keep=0.25) as handle:
        out = peft.generate(**call, **oracle.greedy(model))
        assert handle.last.tokens_after == (6,)
        assert out.shape[1] == call["input_ids"].shape[1] + 5
    other = tiny.build("llava")
    with patch(other, keep=0.25) as handle:
        wrapped = get_peft_model(other, config).eval()
        wrapped.generate(**call, **oracle.greedy(other))
        assert handle.last.tokens_after == (6,)


@torch.no_grad()
def test_pipelines_of_connector_methods(model, call):
    with patch(model, "vtc_cls:0.8 | divprune:5") as handle:
        got = model(**call).logits
        assert handle.last.tokens_after == (5,)
        first = create("vtc_cls")
        assert handle.config.to_spec() == "vtc_cls:0.8 | divprune:5"
    with patch(model, [first, "divprune:5"], keep=0.8) as handle:
        assert torch.equal(model(**call).logits, got)
    with patch(
        model, CompressionConfig.from_spec("divprune:20 | vtc_cls:5", positions="original")
    ) as handle:
        logits = model(**call).logits
        record = handle.last
    assert (record.tokens_after, record.positions) == ((5,), "original")
    want = oracle.masked_logits(model, call, record.kept, record.tokens_before)
    seen = oracle.drop_mask(model, call, record.kept, record.tokens_before).bool()
    assert (logits - want)[seen].abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "vipllava", "paligemma", "qwen2_vl", "ovis2"])
def test_auto_keep_is_decided_per_image(family):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED)
    with patch(model, keep="auto", positions="original") as handle:
        logits = model(**call).logits
        record = handle.last
        ids = model.generate(**call, **oracle.greedy(model))
        if len(set(record.tokens_after)) > 1 and family in ("vipllava", "paligemma", "ovis2"):
            with pytest.raises(UnsupportedInputError, match="beam"):
                model.generate(**call, **oracle.greedy(model), num_beams=2)
    assert all(1 <= after < 26 for after in record.tokens_after)
    want = oracle.masked_logits(model, call, record.kept, record.tokens_before)
    seen = oracle.drop_mask(model, call, record.kept, record.tokens_before).bool()
    assert (logits - want)[seen].abs().max() < 1e-5
    assert torch.equal(ids[:, : call["input_ids"].shape[1]], call["input_ids"])


@torch.no_grad()
def test_overlay_dims_what_was_dropped(model, call):
    image = Image.fromarray(np.full((70, 70, 3), 250, dtype=np.uint8))
    with patch(model, "fastervlm", keep=3) as handle:
        model(**call)
        picture = np.asarray(handle.overlay(image).convert("L"))
        rows = handle.kept[0].tolist()
        with pytest.raises(UnsupportedInputError, match="1 image"):
            handle.overlay(image, unit=1)
    bright = {(y // 14) * 5 + x // 14 for y, x in zip(*np.nonzero(picture > 240), strict=True)}
    assert bright == set(rows)


@torch.no_grad()
def test_overlay_of_a_cropping_processor_shows_the_crop(model, call):
    size = model.config.vision_config.image_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    with patch(model, keep=3, processor=processor) as handle:
        model(**call)
        assert handle.overlay(Image.new("RGB", (200, 100))).size == (size, size)
    with patch(model, "pool", keep=4) as handle:
        model(**call)
        picture = np.asarray(handle.overlay(Image.new("RGB", (50, 50), "white")))
    assert (picture == 255).all(), "merged tokens were seen"


@torch.no_grad()
def test_forwards_that_others_set_on_layers_are_kept(model, call):
    """Accelerate sets a forward on instances, before or after us."""
    layers = model.model.vision_tower.encoder.layers
    want = model(**call).logits
    seen = []

    def wrap(layer):
        inner = layer.forward

        def forward(*args, **kwargs):
            seen.append(layer)
            return inner(*args, **kwargs)

        layer.forward = forward

    wrap(layers[0])
    handle = patch(model, keep=0.25)
    wrap(layers[1])
    model(**call)
    assert {id(layer) for layer in seen} == {id(layers[0]), id(layers[1])}
    handle.remove()
    seen.clear()
    assert torch.equal(model(**call).logits, want)
    assert len(seen) == 2
