"""Typed errors that name value, choice and remedy; after any of them the model works."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from tests import tiny
from tests.seam import oracle
from vlmcompress import (
    ConfigError,
    ConfigTypeError,
    EvidenceError,
    PlaceholderMismatchError,
    UnknownMethodError,
    UnsupportedInputError,
    UnsupportedModelError,
    VLMCompressError,
    patch,
)
from vlmcompress.methods import create


@pytest.fixture(scope="module")
def model():
    return tiny.build("llava")


@pytest.fixture
def call(model):
    return tiny.inputs(model, oracle.ONE)


@pytest.mark.parametrize(
    "keep", [True, False, None, "half", float("nan"), 0, 0.0, -1, -0.5, 1.5, [0.1], 1j]
)
def test_keep_is_checked(model, keep):
    with pytest.raises((ConfigError, ConfigTypeError), match="keep"):
        patch(model, keep=keep)
    assert "generate" not in model.__dict__


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"method": "vtc_clss", "keep": 0.1}, UnknownMethodError, "'vtc_cls'"),
        ({"method": 7, "keep": 0.1}, ConfigTypeError, "method is 7"),
        ({"method": [], "keep": 0.1}, ConfigError, "at least one"),
        ({"method": "vtc_cls:0.1 |", "keep": None}, ConfigError, "cannot be read"),
        ({"method": "vtc_cls(layer=3)", "keep": 0.1}, ConfigError, "no option layer"),
        ({"method": "vtc_cls@2", "keep": 0.1}, ConfigError, "names a layer"),
        ({"method": "vtc_cls:0.2 | divprune:0.5", "keep": 0.1}, ConfigError, "one place"),
        ({"method": "divprune", "keep": "auto"}, ConfigError, "scores"),
        ({"keep": 0.1, "positions": "renumber"}, ConfigError, "contiguous"),
        ({"keep": 0.1, "seed": "x"}, ConfigTypeError, "seed"),
    ],
)
def test_configurations_are_checked(model, arguments, error, text):
    with pytest.raises(error, match=text):
        patch(model, **arguments)
    assert "generate" not in model.__dict__


def test_layers_that_do_not_exist_are_named_at_patch_time(model):
    with pytest.raises(ConfigError, match="6 layers"):
        patch(model, create("fastervlm", layer=9), keep=0.1)


@pytest.mark.parametrize("family", tiny.UNSUPPORTED)
def test_families_without_their_turn_are_refused(family):
    with pytest.raises(UnsupportedModelError, match="not supported yet"):
        patch(tiny.build(family), keep=0.1)


def test_text_only_models_and_other_objects_are_refused():
    with pytest.raises(UnsupportedModelError, match="no vision tower"):
        patch(tiny.text_only(), keep=0.1)
    with pytest.raises(UnsupportedModelError, match="HuggingFace"):
        patch(torch.nn.Linear(2, 2), keep=0.1)


@torch.no_grad()
def works(model, call, want):
    """The model answers, patched and unpatched."""
    assert torch.equal(model.generate(**call, **oracle.greedy(model)), want)


@torch.no_grad()
def test_placeholders_that_do_not_match(model, call):
    with patch(model, keep=0.25):
        want = model.generate(**call, **oracle.greedy(model))
        wrong = {
            **call,
            "input_ids": call["input_ids"][:, :-12],
            "attention_mask": call["attention_mask"][:, :-12],
        }
        doubled = {**call, "pixel_values": call["pixel_values"].repeat(2, 1, 1, 1)}
        for bad in (wrong, doubled):
            for run in (model, lambda **x: model.generate(**x, max_new_tokens=1)):
                with pytest.raises(PlaceholderMismatchError, match="placeholders"):
                    run(**bad)
                works(model, call, want)


@torch.no_grad()
def test_inputs_that_cannot_be_compressed(model, call):
    embeds = model.get_input_embeddings()(call["input_ids"])
    rest = {k: v for k, v in call.items() if k != "input_ids"}
    with patch(model, keep=0.25) as handle:
        with pytest.raises(UnsupportedInputError, match="input_ids"):
            model(**rest, inputs_embeds=embeds)
        with pytest.raises(UnsupportedInputError, match="input_ids"):
            model.generate(**rest, inputs_embeds=embeds, max_new_tokens=1)
        with pytest.raises(UnsupportedInputError, match="not both"):
            model(**call, mm_encoder_outputs=handle.encode(**call))
    qwen = tiny.build("qwen2_vl")
    video = tiny.inputs(qwen, oracle.ONE)
    with patch(qwen, keep=0.25), pytest.raises(UnsupportedInputError, match="video"):
        qwen(**video, pixel_values_videos=torch.zeros(4, 3))


@torch.no_grad()
def test_a_cls_token_among_the_features_is_refused_clearly(model, call):
    with (
        patch(model, keep=0.25),
        pytest.raises(EvidenceError, match="25 tokens but an image has 26"),
    ):
        model(**call, vision_feature_select_strategy="full")


class Boom(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise RuntimeError("boom")


@torch.no_grad()
def test_a_call_that_fails_half_way_leaves_everything_working(model, call, monkeypatch):
    unpatched = model.generate(**call, **oracle.greedy(model))
    with patch(model, keep=0.25):
        want = model.generate(**call, **oracle.greedy(model))
        with pytest.raises(RuntimeError, match="boom"):
            model.generate(
                **call, max_new_tokens=3, stopping_criteria=StoppingCriteriaList([Boom()])
            )
        works(model, call, want)

        def out_of_memory(*args, **kwargs):
            raise torch.OutOfMemoryError("no memory left")

        stack = model.model.language_model.layers[1].mlp
        tower = model.model.vision_tower.encoder.layers[3].mlp
        for module in (stack, tower):
            hook = module.register_forward_pre_hook(out_of_memory)
            for run in (model, lambda **x: model.generate(**x, max_new_tokens=1)):
                with pytest.raises(torch.OutOfMemoryError):
                    run(**call)
            hook.remove()
            works(model, call, want)
    works(model, call, unpatched)


def test_a_removed_handle_says_so(model):
    handle = patch(model, keep=0.25)
    handle.remove()
    assert repr(handle) == "Handle(removed)"
    with pytest.raises(VLMCompressError, match="removed"):
        _ = handle.report
