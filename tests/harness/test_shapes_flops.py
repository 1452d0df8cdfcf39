"""Shapes are what their names say, and the FLOPs formula agrees with torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eval_harness import flops, shapes
from vlmcompress.core.errors import ConfigError


def _counted(model, call) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def model():
    return shapes.build("tiny", attn_implementation="eager")


def test_prefill_agrees_with_torch(model):
    inputs = shapes.example_inputs(model)
    counted = _counted(model, lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    formula = flops.prefill(
        model.config, images=1, connector_tokens=36, prompt_tokens=inputs["input_ids"].shape[1]
    )
    assert formula.total == pytest.approx(counted, rel=0.01)


def test_tower_agrees_with_torch(model):
    pixels = shapes.example_inputs(model)["pixel_values"]
    counted = _counted(model, lambda: model.model.vision_tower(pixels))
    assert flops.tower(model.config.vision_config) == pytest.approx(counted, rel=0.01)


def test_connector_agrees_with_torch(model):
    rows = torch.randn(1, 36, 64)
    counted = _counted(model, lambda: model.model.multi_modal_projector(rows))
    assert flops.connector(model.config, 36) == counted


def test_total_is_the_sum():
    assert flops.Flops(1, 2, 3).to_dict() == {
        "tower": 1,
        "connector": 2,
        "prefill": 3,
        "total": 6,
    }


def test_sizes_of_the_named_shapes():
    with torch.device("meta"):
        model = shapes.LlavaForConditionalGeneration(shapes.config("llava-1.5-1b"))
    text = sum(p.numel() for p in model.model.language_model.parameters())
    assert 1.0e9 < text < 1.2e9
    assert model.config.image_seq_length == 576


def test_same_seed_same_weights_and_no_global_rng():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = shapes.build("tiny", torch.bfloat16), shapes.build("tiny", torch.bfloat16)
    assert torch.equal(torch.rand(2), expected)
    assert first.dtype == torch.bfloat16
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_inputs_fit_the_model(model):
    inputs = shapes.example_inputs(model, text_tokens=10)
    assert inputs["input_ids"].shape == (1, 46)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 36
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_unknown_shape():
    with pytest.raises(ConfigError, match="known shapes"):
        shapes.build("huge")
