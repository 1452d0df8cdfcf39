"""A tower that works window by window: what is read of it stands in the order of the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from tests import tiny
from tests.seam.equalities import traces
from tests.seam.test_evidence import attention_maps
from vlmcompress import EvidenceError, patch
from vlmcompress.families.qwen2_5_vl import by_window

FAMILY = "qwen2_5_vl"
#: In patches; windows are 2 x 2 tokens, so that those of the second and third are cut.
SIZES = [(8, 12), (6, 10), (10, 6), (4, 4)]


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_the_order_is_that_of_transformers(side: int) -> None:
    grids = torch.tensor([[1, 6, 10], [1, 16, 16], [1, 2, 34], [1, 18, 14]])
    want, _ = get_vision_window_index(grids, 2, side * 2 * 14, 14)
    got, before = [], 0
    for _, h, w in grids.tolist():
        got.append(by_window((h // 2, w // 2), side) + before)
        before += h * w // 4
    assert torch.equal(torch.cat(got), want)


@torch.no_grad()
def test_attention_is_that_of_the_token_it_stands_beside() -> None:
    model = tiny.build(FAMILY)
    call = tiny.inputs(model, [tiny.Prompt(images=4, text=5)], image_sizes=SIZES)
    tower = model.model.visual
    order, _ = get_vision_window_index(
        call["image_grid_thw"], 2, tower.window_size, tower.patch_size
    )
    with patch(model, "received_attention(layers=(-1,))", keep=3) as handle:
        model(**call)
        kept = handle.kept
    maps = attention_maps(FAMILY, call)[tower.config.depth - 1]
    received = torch.cat([weights[0].mean((0, 1)) for weights in maps])
    scores = received.view(-1, 4).sum(1)[order.argsort()]
    lengths = [h * w // 4 for h, w in SIZES]
    for rows, values in zip(kept, scores.split(lengths), strict=True):
        assert rows.tolist() == sorted(values.topk(3).indices.tolist())


@pytest.mark.parametrize("layer", [0, 1, -5])
def test_layers_that_see_windows_only_are_refused(layer: int) -> None:
    model = tiny.build(FAMILY)
    with pytest.raises(EvidenceError, match="layers 2, 3, 4, 5 see all of it"):
        patch(model, f"received_attention(layers=({layer},))", keep=3)
    assert traces(model) == []


@torch.no_grad()
def test_sizes_go_through_generate_as_one_by_one() -> None:
    model: Any = tiny.build(FAMILY)
    prompts = [tiny.Prompt(images=1, text=5 + i) for i in range(4)]
    call = tiny.inputs(model, prompts, image_sizes=SIZES, padding="left")
    with patch(model, "received_attention", keep=0.3):
        together = model.generate(**call, max_new_tokens=4, do_sample=False)[:, -4:]
        first = 0
        for i, (h, w) in enumerate(SIZES):
            valid = call["attention_mask"][i].bool()
            own = {
                k: v[i : i + 1, valid]
                for k, v in call.items()
                if v.shape[:1] == (4,) and k not in ("image_grid_thw", "pixel_values")
            }
            own["image_grid_thw"] = call["image_grid_thw"][i : i + 1]
            own["pixel_values"] = call["pixel_values"][first : first + h * w]
            first += h * w
            alone = model.generate(**own, max_new_tokens=4, do_sample=False)[:, -4:]
            assert torch.equal(alone[0], together[i]), i


@torch.no_grad()
def test_the_default_reads_layers_that_see_all() -> None:
    """Also where only a few do, as in the released models."""
    model = tiny.build(FAMILY)
    model.model.visual.fullatt_block_indexes = [1, 3, 5]
    call = tiny.inputs(model, [tiny.Prompt(images=1, text=5)])
    with patch(model, keep=0.5) as handle:
        model(**call)
        assert handle.config.to_spec() == "received_attention(layers=(3, 5)):0.5"
        assert handle.last.tokens_after == (12,)
