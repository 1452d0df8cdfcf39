"""Vision transformers without a language model: methods inside them that have trained parts."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.seam import bare_models, equalities, plain_bare
from tests.seam.bare_models import DEPTH, HEADS, N, embed
from tests.seam.plain_learned import shake
from vlmcompress import patch
from vlmcompress.methods import create

LEARNED = ("sit", "t2t(learned=True)", "sparsifiner")


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2_classifier", "vit", "vit_classifier"])
@torch.no_grad()
def test_sparse_attention_equals_one_written_out(name):
    model, images = bare_models.build(name), bare_models.pixels()
    with patch(model, "sparsifiner(rank=4)", keep=0.4) as handle:
        shake(handle.parts)
        weights = {key: value.clone() for key, value in handle.parts.state_dict().items()}
        got, last = embed(model, images), handle.last
        assert last.tower_keys == (10,) * DEPTH
        assert last.tokens_after == (N,) * 3
        handle.set(keep=1.0)
        whole = embed(model, images)
    want = plain_bare.sparse(model, images, weights, 10, heads=HEADS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    assert torch.equal(whole, embed(model, images))
    assert not torch.allclose(got, whole, atol=1e-3)


@pytest.mark.parametrize("spec", LEARNED)
@torch.no_grad()
def test_trained_parts_are_saved_loaded_and_taken_off(spec, tmp_path):
    model, images = bare_models.build("clip"), bare_models.pixels()
    want, keys, path = embed(model, images), list(model.state_dict()), tmp_path / "parts"
    handle = patch(model, spec, keep=0.4)
    parts = handle.parts
    shake(parts)
    parts.save(path)
    trained = embed(model, images)
    assert list(model.state_dict()) == keys
    handle.set(keep=1.0)
    assert torch.equal(embed(model, images), want)
    assert handle.set(keep=0.4).parts is parts
    assert torch.equal(embed(copy.deepcopy(model), images), trained)
    handle.remove()
    assert equalities.traces(model) == []
    loaded = create(spec.partition("(")[0], weights=str(path))
    with patch(model, loaded, keep=0.4):
        assert torch.equal(embed(model, images), trained)
    assert torch.equal(embed(model, images), want)


@pytest.mark.parametrize("spec", ["sit", "t2t(learned=True)"])
def test_parts_train_towards_the_whole_towers_embedding(spec):
    model, images = bare_models.build("open_clip").requires_grad_(False), bare_models.pixels()
    want = embed(model, images)
    with patch(model, spec, keep=0.4) as handle:
        optimiser = torch.optim.Adam(handle.parts.parameters(), lr=0.02)
        losses = []
        for _ in range(25):
            loss = (embed(model, images) - want).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
