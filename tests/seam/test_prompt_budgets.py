"""scope='prompt' in live models: mixed sizes, several images, padded batches, later turns."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.seam import oracle
from tests.seam.equalities import asking
from tests.seam.test_conversation import Talk
from tests.tiny import Prompt
from vlmcompress import UnsupportedInputError, patch
from vlmcompress.methods import create
from vlmcompress.methods.ops.shares import apportion, at_least_one

#: One image, two, none, three: padded rows.
ROWS = (Prompt(1, 9), Prompt(2, 5), Prompt(0, 6), Prompt(3, 8))
IMAGES = (1, 2, 0, 3)
SIZES = {
    "qwen2_vl": [(4, 8), (8, 8), (8, 4), (4, 4), (12, 8), (4, 8)],
    "llava_next": [(3, 8), (8, 3), (7, 8), (4, 4), (3, 8), (8, 8)],
}
METHODS = {"llava": "fastervlm", "qwen2_vl": "received_attention", "llava_next": "vtc_cls"}


def batch(family: str, prompts=ROWS, **more):
    model = tiny.build(family)
    sizes = {"image_sizes": SIZES[family]} if family in SIZES else {}
    return model, tiny.inputs(model, prompts, **sizes, **more)


def candidates(record) -> list[int]:
    """Tokens of each image without newlines."""
    found = []
    for n, segments in zip(record.tokens_before, record.segments, strict=True):
        lines = segments[1].grid[1] if len(segments) > 1 else 0
        found.append(n - lines)
    return found


def by_row(values: list[int]) -> list[list[int]]:
    rows, first = [], 0
    for count in IMAGES:
        rows.append(values[first : first + count])
        first += count
    return [row for row in rows if row]


@pytest.mark.parametrize("keep", [9, 0.3, 1.0])
@pytest.mark.parametrize("family", METHODS)
@torch.no_grad()
def test_every_row_has_its_budget(family: str, keep: float):
    model, call = batch(family)
    with patch(model, f"{METHODS[family]}(scope='prompt')", keep=keep) as handle:
        logits = model(**call).logits
        record = handle.last
    assert torch.isfinite(logits).all()
    sizes, method = by_row(candidates(record)), create(METHODS[family])
    for row, after in zip(sizes, by_row(list(record.tokens_after)), strict=True):
        total = method.nominal(sum(row), keep)
        wanted = at_least_one(apportion(total, row, row))
        if keep != 1.0:
            assert after == wanted
            assert sum(after) == total
    if keep == 1.0:
        assert record.tokens_after == record.tokens_before
        assert torch.equal(logits, tiny.build(family)(**call).logits)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", METHODS)
@torch.no_grad()
def test_a_padded_batch_equals_its_rows(family: str, padding: str):
    model, call = batch(family, padding=padding)
    sizes = SIZES.get(family)
    with patch(model, f"{METHODS[family]}(scope='prompt')", keep=8) as handle:
        together = model(**call).logits
        kept, first = handle.kept, 0
        for b, images in enumerate(IMAGES):
            real = call["attention_mask"][b].bool()
            alone = {
                k: call[k][b : b + 1, real]
                for k in ("input_ids", "attention_mask", "mm_token_type_ids")
                if k in call
            }
            if images:
                alone |= pixels_of(family, call, sizes, first, images)
            logits = model(**alone).logits
            torch.testing.assert_close(logits[0], together[b, real], atol=2e-5, rtol=1e-4)
            if images:
                own = handle.kept
                for mine, theirs in zip(own, kept[first : first + images], strict=True):
                    assert torch.equal(mine, theirs)
            first += images


def pixels_of(family: str, call, sizes, first: int, count: int) -> dict:
    """The pixels of some images of a batch."""
    if family == "qwen2_vl":
        patches = [h * w for h, w in sizes]
        start, stop = sum(patches[:first]), sum(patches[: first + count])
        grids = call["image_grid_thw"][first : first + count]
        return {"pixel_values": call["pixel_values"][start:stop], "image_grid_thw": grids}
    names = ("pixel_values", "image_sizes")
    return {name: call[name][first : first + count] for name in names if name in call}


@torch.no_grad()
def test_a_method_that_reads_the_question():
    model, call = batch("llava")
    with patch(model, "cdpruner(scope='prompt')", keep=7, **asking(model)) as handle:
        model(**call)
        assert handle.last.tokens_after == (7, 4, 3, 3, 2, 2)


@torch.no_grad()
def test_encoding_once_splits_by_the_prompts_it_was_given():
    model, call = batch("llava")
    with patch(model, "fastervlm(scope='prompt')", keep=7) as handle:
        want = model(**call).logits
        assert handle.last.tokens_after == (7, 4, 3, 3, 2, 2)
        rest = {k: v for k, v in call.items() if k != "pixel_values"}
        encoded = handle.encode(**call)
        assert torch.equal(model(**rest, mm_encoder_outputs=encoded).logits, want)
        with pytest.raises(UnsupportedInputError, match="input_ids"):
            handle.encode(pixel_values=call["pixel_values"])


@torch.no_grad()
def test_later_turns_share_the_budget_of_their_own_images():
    """Rows of the new columns count, not those of the images that the cache holds."""
    model = tiny.build("llava")
    with patch(model, "fastervlm(scope='prompt')", keep=7) as handle:
        talk = Talk(model, rows=2)
        talk.say(1, 6, seed=1)
        talk.answer()
        assert handle.last.tokens_after == (7, 7)
        talk.say(2, 8, seed=2)
        talk.answer()
        assert handle.last.tokens_after == (4, 3, 4, 3)


@torch.no_grad()
def test_generation_equals_a_forward():
    model, call = batch("llava", prompts=(Prompt(2, 7),))
    with patch(model, "fastervlm(scope='prompt')", keep=9) as handle:
        ids = model.generate(**call, **oracle.greedy(model, 1))
        logits = model(**call).logits
        assert handle.last.tokens_after == (5, 4)
    masked = logits[0, -1].index_fill(0, torch.tensor(tiny.special_ids(model)), -torch.inf)
    assert int(ids[0, -1]) == int(masked.argmax())


@torch.no_grad()
def test_a_count_below_the_number_of_images():
    model, call = batch("llava")
    with (
        patch(model, "fastervlm(scope='prompt')", keep=2),
        pytest.raises(UnsupportedInputError, match="3 images and keep=2"),
    ):
        model(**call)
