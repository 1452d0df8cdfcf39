"""The tiny models behave like the real ones as far as the other tests rely on it."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch

from . import (
    FAMILIES,
    RAGGED_GRID_FAMILIES,
    UNSUPPORTED,
    Prompt,
    build,
    inputs,
    special_ids,
    text_only,
    tokens_per_image,
)

PROMPTS = (Prompt(2, 7), Prompt(1, 5), Prompt(0, 4))
SIZES = [(4, 8), (8, 4), (6, 6)]

families = pytest.mark.parametrize("family", FAMILIES)
cached = functools.cache(build)


def _image_features(model, batch):
    function = model.base_model.get_image_features
    names = set(inspect.signature(function).parameters) & set(batch)
    return function(**{name: batch[name] for name in names}, return_dict=True).pooler_output


def _rows(features):
    return sum(image.shape[0] for image in features)


def _placeholders(model, batch):
    return batch["input_ids"] == model.config.image_token_id


def _last_logits(model, batch, **overrides):
    with torch.no_grad():
        return model(**{**batch, **overrides}).logits[:, -1]


@families
@pytest.mark.parametrize("padding", ["left", "right"])
def test_forward_on_ragged_batch(family, padding):
    model = cached(family)
    batch = inputs(model, PROMPTS, padding=padding)
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    assert logits.isfinite().all()
    assert (batch["attention_mask"][0] == 1).all()
    assert batch["attention_mask"][2].sum() == 4


@families
def test_generates_only_text(family):
    model = cached(family)
    batch = inputs(model, PROMPTS)
    out = model.generate(
        **batch, max_new_tokens=4, do_sample=False, suppress_tokens=special_ids(model)
    )
    new = out[:, batch["input_ids"].shape[1] :]
    assert new.shape == (3, 4)
    assert not torch.isin(new, torch.tensor(special_ids(model))).any()


@families
def test_placeholders_match_features(family):
    model = cached(family)
    batch = inputs(model, PROMPTS)
    features = _image_features(model, batch)
    assert _placeholders(model, batch).sum() == _rows(features) == 3 * tokens_per_image(model)
    assert 16 <= tokens_per_image(model) <= 56


@pytest.mark.parametrize("family", RAGGED_GRID_FAMILIES)
def test_images_of_different_sizes(family):
    model = cached(family)
    batch = inputs(model, PROMPTS, image_sizes=SIZES)
    expected = tokens_per_image(model, SIZES)
    assert [image.shape[0] for image in _image_features(model, batch)] == expected
    counts = _placeholders(model, batch).sum(dim=1).tolist()
    assert counts == [expected[0] + expected[1], expected[2], 0]
    assert _last_logits(model, batch).isfinite().all()


@families
def test_logits_react_to_visual_tokens(family):
    model = cached(family)
    batch = inputs(model, PROMPTS[:2])
    known = {name: value for name, value in batch.items() if name != "input_ids"}
    positions = model._prepare_position_ids_for_generation(batch["input_ids"], known)
    drop = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.75
    mask = batch["attention_mask"].masked_fill(_placeholders(model, batch) & drop, 0)
    full = _last_logits(model, batch, position_ids=positions)
    dropped = _last_logits(model, batch, position_ids=positions, attention_mask=mask)
    assert ((full - dropped).abs().amax(dim=-1) > 0.1).all()


@families
def test_text_alone_needs_no_pixels(family):
    model = cached(family)
    batch = inputs(model, [Prompt(0, 4), Prompt(0, 6)])
    assert not {"pixel_values", "image_grid_thw", "image_sizes"} & set(batch)
    assert _last_logits(model, batch).isfinite().all()


def test_seed_decides_and_global_state_stays():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, second, other = build("llava"), build("llava"), build("llava", seed=1)
    inputs(first, PROMPTS)
    assert torch.equal(torch.rand(3), expected)
    weights = [model.state_dict()["lm_head.weight"] for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not first.training


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_families_build(family):
    assert build(family).config.model_type == family


def test_text_only_builds():
    assert text_only().config.model_type == "llama"
