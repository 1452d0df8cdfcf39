"""AnyRes: tokens lie where the model's own packing puts them; budgets and evidence follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.tiny import Prompt
from vlmcompress import UnsupportedInputError, patch
from vlmcompress.families import family_of
from vlmcompress.live.encode import encoder_arguments

FAMILIES = ("llava_next", "llava_onevision")
SIZES = [(3, 8), (8, 3), (7, 8), (4, 4)]
SIDE, PATCHES = 4, 16


def prompt(model, sizes=SIZES):
    prompts = [Prompt(1, 6), Prompt(2, 9), Prompt(1, 4)][: len(sizes)]
    return tiny.inputs(model, prompts, image_sizes=sizes)


def layouts(model, call):
    arguments = encoder_arguments(model.base_model, call)
    return family_of(model).layouts(model.base_model, arguments, [])


@torch.no_grad()
def packed_rows(model, call) -> list[torch.Tensor]:
    """Per image [n] number (view * patches + patch) of each token, NaN for newlines.

    The connector is replaced by one that puts out row numbers, so that the model's own code packs
    them.
    """
    base = model.base_model
    arguments = encoder_arguments(base, call)

    def numbers(module, args, output):
        views = torch.arange(len(output) * PATCHES).view(len(output), PATCHES, 1)
        return views.expand_as(output).float()

    hook = base.multi_modal_projector.register_forward_hook(numbers)
    newline = base.image_newline.data.clone()
    base.image_newline.data.fill_(float("nan"))
    try:
        rows = base.get_image_features(**arguments, return_dict=True).pooler_output
    finally:
        hook.remove()
        base.image_newline.data.copy_(newline)
    first, found = 0, []
    for image, views in zip(rows, family_of(model).views(base, arguments), strict=True):
        found.append(image[:, 0] - first)
        first += views * PATCHES
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_are_those_of_the_models_packing(family):
    model = tiny.build(family)
    call = prompt(model)
    shrunk = 0
    for rows, layout in zip(packed_rows(model, call), layouts(model, call), strict=True):
        tile = torch.tensor(layout.tile)
        assert torch.equal(tile < 0, rows.isnan())
        whole = rows == rows.round()
        shrunk += int((~whole & ~rows.isnan()).any())
        plain = whole & (tile >= 0)
        assert torch.equal(tile[plain], (rows[plain] // PATCHES).long())
        assert [s.kind for s in layout.segments] == ["base", "tile"]
        assert layout.segments[-1].slice.stop == len(rows)
        assert layout.segments[-1].length == len(rows) - PATCHES
        columns = layout.segments[-1].grid[2]
        assert (tile[PATCHES:].view(-1, columns)[:, -1] == -1).all()
    assert shrunk == (3 if family == "llava_onevision" else 0)


def test_images_of_one_prompt_stay_whole_in_onevision():
    model = tiny.build("llava_onevision")
    call = prompt(model, [(3, 8)])
    call["batch_num_images"] = torch.tensor([2])
    call["image_sizes"] = call["image_sizes"].repeat(2, 1)
    for layout in layouts(model, call):
        assert layout.tile == (*[0] * PATCHES, -1)
        assert len(layout.segments) == 1


@torch.no_grad()
def attention_by_view(model, call) -> torch.Tensor:
    """[views, patches] head-mean [CLS] attention of the second last layer, from eager attention."""
    base = model.base_model
    views = family_of(model).views(base, encoder_arguments(base, call))
    pixels = torch.cat([p[:n] for p, n in zip(call["pixel_values"], views, strict=True)])
    tower = base.vision_tower
    tower.set_attn_implementation("eager")
    try:
        out = tower(pixels, output_attentions=True)
    finally:
        tower.set_attn_implementation("sdpa")
    return out.attentions[-2][:, :, 0, 1:].mean(1)


def test_each_tile_keeps_its_own_best_patches():
    model = tiny.build("llava_next")
    call = prompt(model)
    rows, scores = packed_rows(model, call), attention_by_view(model, call).flatten()
    with torch.no_grad(), patch(model, "fastervlm", keep=3) as handle:
        model(**call)
        kept = handle.last.kept
    first = 0
    for image, found, layout in zip(rows, kept, layouts(model, call), strict=True):
        wanted = []
        for view in range(max(layout.tile) + 1):
            here = (torch.tensor(layout.tile) == view).nonzero()[:, 0]
            best = scores[first + image[here].long()].topk(3).indices
            wanted += here[best].tolist()
        assert found.tolist() == sorted(wanted)
        first += (max(layout.tile) + 1) * PATCHES


def test_interpolated_evidence_is_what_the_model_would_interpolate():
    """Evidence of a shrunk map equals features that hold the same numbers."""
    model = tiny.build("llava_onevision")
    call = prompt(model, [(7, 8)])
    base = model.base_model
    arguments = encoder_arguments(base, call)
    family = family_of(model)
    views = family.views(base, arguments)[0]
    numbers = torch.arange(views * PATCHES).view(views, 1, PATCHES).float()
    (layout,) = layouts(model, call)
    found = family.by_token(base, arguments, [numbers], [0], layout, "sum")[0, 0]
    wanted = packed_rows(model, call)[0].nan_to_num(0)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("newlines", ["kept", "dropped", "candidates"])
@pytest.mark.parametrize("scope", ["tile", "image"])
def test_newline_policies_drop_and_keep_what_they_say(family, newlines, scope):
    if (scope, newlines) == ("tile", "candidates"):
        pytest.skip("refused: a newline belongs to no tile")
    model = tiny.build(family)
    call = prompt(model)
    spec = f"random(scope={scope!r},newlines={newlines!r})"
    with torch.no_grad(), patch(model, spec, keep=0.5) as handle:
        logits = model(**call).logits
        record = handle.last
    assert torch.isfinite(logits).all()
    for rows, layout in zip(record.kept, layouts(model, call), strict=True):
        tile = torch.tensor(layout.tile)
        lines = (tile < 0).nonzero()[:, 0].tolist()
        left = [row for row in rows.tolist() if row in lines]
        if newlines == "kept":
            assert left == lines
        elif newlines == "dropped":
            assert left == []
        body = len(rows) - (len(left) if newlines == "kept" else 0)
        candidates = len(tile) if newlines == "candidates" else int((tile >= 0).sum())
        views = max(layout.tile) + 1
        assert abs(body - 0.5 * candidates) <= (views if scope == "tile" else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_its_samples(family):
    model = tiny.build(family)
    call = prompt(model)
    with torch.no_grad(), patch(model, "uniform(newlines='kept')", keep=0.4, processor=None):
        together = model(**call)
        for row, images in enumerate((slice(0, 1), slice(1, 3), slice(3, 4))):
            real = call["attention_mask"][row].bool()
            text = {k: call[k][row : row + 1, real] for k in ("input_ids", "attention_mask")}
            alone = model(**text, **{k: call[k][images] for k in ("pixel_values", "image_sizes")})
            torch.testing.assert_close(
                alone.logits[0], together.logits[row, real], atol=2e-5, rtol=1e-4
            )


def test_the_overlay_joins_both_views():
    model = tiny.build("llava_next")
    call = prompt(model, [(3, 8)])
    with torch.no_grad(), patch(model, "fastervlm", keep=2) as handle:
        model(**call)
        picture = handle.overlay(Image.new("RGB", (80, 30), (250, 0, 0)))
        full = handle.last.segments[0][1].grid
    assert picture.size == (80, 30)
    assert full == (1, 4, 9)
    bright = (np.asarray(picture)[..., 0] == 250).mean()
    assert 0.1 < bright < 0.9


@pytest.mark.parametrize("method", ["fastervlm", "divprune", "hired", "visionzip", "holov"])
@torch.no_grad()
def test_nan_in_one_tile_of_one_image_is_refused(method):
    model = tiny.build("llava_next")
    call = prompt(model)
    call["pixel_values"][2, 1] = torch.nan
    with (
        patch(model, method, keep=0.3),
        pytest.raises(UnsupportedInputError, match="hold NaN"),
    ):
        model(**call)


@torch.no_grad()
def test_released_hired_loses_what_it_loses_of_each_image_alone():
    model = tiny.build("llava_next")
    sizes = [(3, 8)] * 3
    call = tiny.inputs(model, [Prompt(1, 6), Prompt(2, 9)], image_sizes=sizes)
    with patch(model, "hired(faithful=True)", keep=7) as handle:
        model(**call)
        kept = handle.kept
        for row, images in enumerate((slice(0, 1), slice(1, 3))):
            real = call["attention_mask"][row].bool()
            text = {k: call[k][row : row + 1, real] for k in ("input_ids", "attention_mask")}
            model(**text, **{k: call[k][images] for k in ("pixel_values", "image_sizes")})
            assert all(map(torch.equal, handle.kept, kept[images]))
