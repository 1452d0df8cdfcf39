"""Vision transformers without a language model: what cannot be, and how that is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

from tests import tiny
from tests.seam import bare_models, equalities
from tests.seam.bare_models import _SHAPE, embed
from vlmcompress import (
    AlreadyPatchedError,
    ConfigError,
    EvidenceError,
    UnsupportedInputError,
    UnsupportedModelError,
    patch,
)
from vlmcompress.core.errors import CheckpointError
from vlmcompress.methods import create


def _masked() -> Any:
    options = _SHAPE | {"encoder_stride": 8}
    return transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**options))


REFUSED = {
    "a convolutional timm model": (
        lambda: timm.create_model("test_resnet"),
        "no VisionTransformer",
    ),
    "a decoder that counts patches": (_masked, "can be reduced"),
    "a mean and a maximum": (lambda: bare_models._timm(global_pool="avgmax"), "pools by 'avgmax'"),
    "other blocks": (
        lambda: bare_models._timm(block_fn=timm.models.vision_transformer.ResPostBlock),
        "ResPostBlock",
    ),
    "other attention": (lambda: bare_models._timm(attn_layer="diff"), "DiffAttention"),
    "normalised attention": (lambda: bare_models._open_clip(scale_attn=True), "scale_attn"),
    "attention by cosines": (
        lambda: bare_models._open_clip(scaled_cosine_attn=True),
        "attends by cosines",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_that_cannot_be_reduced_are_refused(what):
    build, match = REFUSED[what]
    model = build()
    with pytest.raises(UnsupportedModelError, match=match) as error:
        patch(model, "tome", keep=0.5)
    assert "supported are CLIP, SigLIP, DINOv2" in str(error.value)
    assert equalities.traces(model) == []


@pytest.mark.parametrize(
    ("name", "method", "keep", "error", "match"),
    [
        ("clip", "divprune", 0.5, ConfigError, r"'divprune' act.*training are ats, evit"),
        ("clip", "tome:0.5 | divprune:0.5", None, ConfigError, "'divprune' act.*no language model"),
        ("clip", "fastv", 0.5, ConfigError, "'fastv' act.*no language model"),
        ("clip", "tome:0.5 | fastv:0.5", None, ConfigError, "'fastv' act.*no language model"),
        ("clip", create("tome"), 0.5, ConfigError, "tome_tower"),
        ("clip", "sit(weights='nowhere.safetensors')", 0.5, CheckpointError, "nowhere"),
        ("timm_token", "sparsifiner", 0.5, UnsupportedModelError, "keeps to itself"),
        ("open_clip_own", "sparsifiner", 0.5, UnsupportedModelError, "keeps to itself"),
        ("registers", "sparsifiner", 0.5, UnsupportedModelError, "keeps to itself"),
        ("clip", "tome", None, ConfigError, "no budget"),
        ("clip", "tome", "auto", ConfigError, "inside it"),
        ("clip", "tome(layers=(3,))", 5, ConfigError, "come down to 13"),
        ("open_clip", "tome(layers=(4,))", 0.5, ConfigError, "4 layers"),
        ("siglip", "evit", 0.5, EvidenceError, "has none; use hvt"),
        ("timm_map", "evit", 0.5, EvidenceError, "has none; use hvt"),
    ],
)
def test_methods_that_cannot_act_are_refused(name, method, keep, error, match):
    model = bare_models.build(name)
    with pytest.raises(error, match=match):
        patch(model, method, keep=keep)
    assert equalities.traces(model) == []


@pytest.mark.parametrize(
    "given", [{"positions": "original"}, {"clip": "some/model"}, {"question": "What is this?"}]
)
def test_there_is_no_language_model_to_speak_of(given):
    model = bare_models.build("clip")
    with pytest.raises(ConfigError, match="has no language model"):
        patch(model, "tome", keep=0.5, **given)
    with patch(model, "tome", keep=0.5) as handle:
        with pytest.raises(ConfigError, match="leave positions out"):
            handle.set(positions="original")
        with pytest.raises(UnsupportedModelError, match="no language model"):
            handle.encode(pixel_values=bare_models.pixels())


@pytest.mark.parametrize(
    ("kernel", "match"),
    [("flash_attention_2", "takes no such mask"), ("flex_attention", "ends the whole process")],
)
def test_kernels_that_cannot_weigh_keys_are_refused_where_they_must(kernel, match):
    model = bare_models.build("vit")
    model.config._attn_implementation_internal = kernel
    with pytest.raises(UnsupportedModelError, match=match):
        patch(model, "tome", keep=0.5)
    patch(model, "tome(proportional=False)", keep=0.5).remove()


def test_a_tower_is_patched_once():
    model = bare_models.build("clip")
    with patch(model, "tome", keep=0.5):
        for again in (model, model.vision_model):
            with pytest.raises(AlreadyPatchedError, match="patched already"):
                patch(again, "tome", keep=0.5)
    whole = tiny.build("llava")
    with (
        patch(whole, "uniform", keep=0.5),
        pytest.raises(AlreadyPatchedError, match="part of another model"),
    ):
        patch(whole.model.vision_tower, "tome", keep=0.5)


@pytest.mark.parametrize(
    ("name", "more", "match"),
    [
        ("vit", {"attention_mask": torch.ones(3, 26)}, "carries attention_mask"),
        ("vit", {"output_attentions": True}, "carries output_attentions"),
        ("timm_token", {"is_causal": True}, "carries is_causal"),
    ],
)
@torch.no_grad()
def test_calls_that_speak_of_all_rows_are_refused(name, more, match):
    model, images = bare_models.build(name), bare_models.pixels()
    want = embed(model, images)
    with patch(model, "tome", keep=0.4) as handle:
        with pytest.raises(UnsupportedInputError, match=match):
            model(images, **more)
        with handle.disabled():
            model(images, **more)
            assert torch.equal(embed(model, images), want)
        embed(model, images)
        assert handle.last.tokens_after == (10,) * 3


@torch.no_grad()
def test_a_call_that_fails_leaves_no_pass_behind():
    model, images = bare_models.build("timm_token"), bare_models.pixels()
    want = embed(model, images)
    with patch(model, "tome", keep=0.4) as handle:
        with pytest.raises((AssertionError, RuntimeError)):
            model(torch.randn(1, 3, 24, 24))
        with handle.disabled():
            assert torch.equal(embed(model, images), want)


@torch.no_grad()
def test_nan_is_refused():
    model, images = bare_models.build("open_clip"), bare_models.pixels()
    images[0, 0, 0, 0] = torch.nan
    with patch(model, "tome", keep=0.4), pytest.raises(UnsupportedInputError, match="NaN"):
        embed(model, images)


def test_checkpointing_and_patch_dropout_are_refused_in_training():
    images = bare_models.pixels()
    model = bare_models.build("timm_token")
    model.set_grad_checkpointing()
    with patch(model, "tome", keep=0.4), pytest.raises(UnsupportedInputError, match="second time"):
        model(images)
    model = bare_models._timm(patch_drop_rate=0.5).train()
    with patch(model, "tome", keep=0.4), pytest.raises(UnsupportedInputError, match="dropout"):
        model(images)


@torch.no_grad()
def test_blocks_that_do_not_run_are_noticed():
    model = bare_models.build("clip_vision")
    model.encoder.forward = lambda inputs_embeds, **_: SimpleNamespace(
        last_hidden_state=inputs_embeds
    )
    with patch(model, "tome", keep=0.4), pytest.raises(UnsupportedModelError, match="did not run"):
        model(bare_models.pixels())


def test_what_is_no_tower_is_refused_as_before():
    with pytest.raises(UnsupportedModelError, match="HuggingFace"):
        patch(nn.Linear(2, 2), "tome", keep=0.5)
