"""ATP in models: dropping is the limit of its soft masks, and the heads learn through the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.seam import equalities, oracle
from tests.seam.equalities import world
from tests.seam.test_decoder import checkpoint, decoder_layers, hidden_columns, keys_hidden
from tests.tiny import Prompt
from vlmcompress import CacheMismatchError, ConfigError, UnsupportedModelError, patch
from vlmcompress.core.errors import CheckpointError
from vlmcompress.methods.decoder.atp import budget_loss

FAMILIES = ("llava", "llava_siglip", "paligemma", "qwen2_vl", "glm4v", "aya_vision")
RAGGED = (Prompt(images=2, text=7), Prompt(images=1, text=9), Prompt(images=0, text=6))
ATP = "atp(layers=(1, 2))"
HARD = "atp(layers=(1, 2), temperature=1e6)"
every_family = pytest.mark.parametrize("family", FAMILIES)


def shake(parts: Any, seed: int = 0) -> None:
    """Thresholds that differ from prompt to prompt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def text_of(model: Any, call: dict[str, Tensor]) -> Tensor:
    return call["attention_mask"].bool() & (call["input_ids"] != model.config.image_token_id)


def labels_of(model: Any, call: dict[str, Tensor]) -> Tensor:
    return torch.where(text_of(model, call), call["input_ids"], -100)


@every_family
@torch.no_grad()
def test_dropping_is_hiding(family: str) -> None:
    w = world(family)
    call = tiny.inputs(w.model, RAGGED)
    with patch(w.model, ATP, positions="original") as handle:
        shake(handle.parts)
        logits = w.model(**call).logits
        record = handle.last
    assert record.layer_tokens[0] == (2 * record.tokens_before[0], record.tokens_before[0], 0)
    for early, late in zip(record.layer_tokens[:-1], record.layer_tokens[1:], strict=True):
        assert sum(late) < sum(early)
    with keys_hidden(w.model, hidden_columns(w.model, call, record)):
        want = w.model(**call).logits
    assert (logits - want)[text_of(w.model, call)].abs().max() < 1e-5


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@every_family
@torch.no_grad()
def test_sharp_masks_are_dropping(family: str, kernel: str) -> None:
    w = world(family, kernel)
    call = tiny.inputs(w.model, RAGGED)
    full = w.model(**call).logits
    with patch(w.model, HARD, positions="original") as handle:
        shake(handle.parts)
        hard, record = w.model(**call).logits, handle.last
        assert record.soft_masks == ()
        handle.parts.train()
        soft, softened = w.model(**call, use_cache=False).logits, handle.last
    text = text_of(w.model, call)
    assert (soft - hard)[text].abs().max() < 1e-4
    assert (full - hard)[text].abs().max() > 1e-3
    assert softened.layer_tokens[-1] == record.layer_tokens[0]
    for mask in softened.soft_masks:
        assert tuple(mask.kept.sum(1).tolist()) == record.layer_tokens[mask.layer]
        torch.testing.assert_close(mask.weights, mask.kept.float())


@torch.no_grad()
def test_mild_masks_lie_between_all_and_dropping() -> None:
    model = tiny.build("llava")
    call = tiny.inputs(model, RAGGED)
    text = text_of(model, call)
    full, found = model(**call).logits[text], []
    for temperature in (1e-6, 10.0, 1e6):
        spec = f"atp(layers=(1, 2), temperature={temperature})"
        with patch(model, spec, positions="original") as handle:
            hard = model(**call).logits[text]
            handle.parts.train()
            found.append((model(**call, use_cache=False).logits[text] - hard).abs().mean())
    assert found[0] > found[1] > found[2]
    assert found[2] < 1e-5 < (full - hard).abs().mean()


@every_family
@torch.no_grad()
def test_a_batch_is_its_samples(family: str) -> None:
    w = world(family)
    call = tiny.inputs(w.model, RAGGED)
    with patch(w.model, ATP) as handle:
        shake(handle.parts)
        batch = w.model.generate(**call, **oracle.greedy(w.model))
        counts = torch.tensor(handle.last.layer_tokens)
        for b in range(len(RAGGED)):
            image, n = w.model.config.image_token_id, tiny.tokens_per_image(w.model)
            alone = oracle.row(call, b, image, n)
            ids = w.model.generate(**alone, **oracle.greedy(w.model))
            new = ids.shape[1] - alone["input_ids"].shape[1]
            assert torch.equal(batch[b, -new:], ids[0, -new:])
            if handle.last.layer_tokens and "pixel_values" in alone:
                assert torch.equal(torch.tensor(handle.last.layer_tokens)[:, 0], counts[:, b])


@torch.no_grad()
def test_soft_masks_of_a_batch_are_those_of_its_samples() -> None:
    model = tiny.build("llava")
    call = tiny.inputs(model, RAGGED)
    with patch(model, ATP) as handle:
        shake(handle.parts)
        handle.parts.train()
        batch = model(**call, use_cache=False).logits
        text = text_of(model, call)
        for b in range(2):
            image, n = model.config.image_token_id, tiny.tokens_per_image(model)
            alone = oracle.row(call, b, image, n)
            logits = model(**alone, use_cache=False).logits
            assert (batch[b][text[b]] - logits[0][text_of(model, alone)[0]]).abs().max() < 1e-5


@torch.no_grad()
def test_a_connector_stage_before_it_leaves_places_in_the_grid() -> None:
    model = tiny.build("llava")
    call = tiny.inputs(model, RAGGED)
    with patch(model, f"divprune:0.5 | {HARD}", positions="original") as handle:
        shake(handle.parts)
        hard = model(**call).logits
        handle.parts.train()
        soft = model(**call, use_cache=False).logits
        assert handle.last.tokens_after == (12, 12, 12) or handle.last.tokens_after[0] == 13
    assert (soft - hard)[text_of(model, call)].abs().max() < 1e-4


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@every_family
def test_gradients_reach_every_head(family: str, kernel: str, checkpointing: bool) -> None:
    model = tiny.build(family)
    model.set_attn_implementation(kernel)
    call = tiny.inputs(model, RAGGED)
    model.train()
    if checkpointing:
        checkpoint(model, True)
    with patch(model, ATP) as handle:
        handle.parts.train()
        loss = model(**call, labels=labels_of(model, call), use_cache=False).loss
        loss.backward()
        grads = [p.grad for p in handle.parts.parameters()]
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in grads)
    layer = decoder_layers(model)[-1]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_gradients_are_those_of_the_loss() -> None:
    """One number of a head, moved a little to either side."""
    model = tiny.build("llava").double().requires_grad_(False)
    call = tiny.inputs(model, RAGGED)
    call["pixel_values"] = call["pixel_values"].double()
    labels = labels_of(model, call)
    with patch(model, ATP) as handle:
        parts = handle.parts.train()
        bias = parts.heads["2"].redundant.bias

        def loss() -> Tensor:
            return model(**call, labels=labels, use_cache=False).loss

        loss().backward()
        step, found = 1e-2, []
        with torch.no_grad():
            for sign in (1, -1):
                bias.add_(sign * step)
                found.append(loss().item())
                bias.sub_(sign * step)
        assert bias.grad.item() == pytest.approx((found[0] - found[1]) / (2 * step), rel=0.02)


def test_heads_learn_the_target() -> None:
    model = tiny.build("llava").requires_grad_(False)
    call = tiny.inputs(model, (Prompt(images=1, text=7), Prompt(images=1, text=9)))
    labels, target = labels_of(model, call), 0.8
    with patch(model, ATP) as handle:
        parts = handle.parts.train()
        with torch.no_grad():
            model(**call)
        before = abs(_average(handle) - target)
        optimiser = torch.optim.Adam(parts.parameters(), lr=0.02)
        for _ in range(40):
            loss = model(**call, labels=labels, use_cache=False).loss
            loss = loss + budget_loss(handle.last.soft_masks, 3, target, lambda_atp=0)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        parts.eval()
        with torch.no_grad():
            model(**call)
        after = abs(handle.last.average_keep - target)
    assert after < 0.1 < before


def _average(handle: Any) -> float:
    kept = [mask.kept.sum().item() for mask in handle.last.soft_masks]
    n = handle.last.soft_masks[0].visual.sum().item()
    return (1 + sum(kept) / n) / 3


def test_evaluation_is_what_patch_gives() -> None:
    model = tiny.build("llava")
    with patch(model, ATP) as handle:
        assert not handle.parts.training
        model.train()
        model(**tiny.inputs(model, RAGGED))
        assert handle.last.soft_masks == ()
    model.eval()


# --- parts ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_parts_are_beside_the_model_and_stay_with_their_stage(tmp_path: Path) -> None:
    model = tiny.build("llava")
    call = tiny.inputs(model, RAGGED)
    keys, full = list(model.state_dict()), model(**call).logits
    handle = patch(model, "uniform", keep=0.5)
    assert handle.parts is None
    handle.set(method=ATP)
    parts = handle.parts
    shake(parts)
    assert list(model.state_dict()) == keys
    want = model(**call).logits
    twin = copy.deepcopy(model)
    handle.set(positions="original", seed=3)
    assert handle.parts is parts
    shake(parts, seed=1)
    assert torch.equal(twin(**call).logits, want)
    handle.set(method=["divprune:0.5", ATP])
    assert handle.parts is parts
    handle.set(method="atp(layers=(1,))")
    assert handle.parts is not parts
    handle.set(method=["sit:0.5", ATP])
    with pytest.raises(ConfigError, match=r"'sit', 'atp' learn; use handle\.parts_of\('sit'\)"):
        assert handle.parts
    assert handle.parts_of("atp").config["layers"] == [1, 2]
    with pytest.raises(ConfigError, match="No stage of method 'fastv' learns"):
        handle.parts_of("fastv")
    handle.remove()
    assert equalities.traces(model) == []
    assert torch.equal(model(**call).logits, full)


@torch.no_grad()
def test_saved_and_loaded_they_answer_the_same(tmp_path: Path) -> None:
    model, path = tiny.build("llava"), tmp_path / "atp.safetensors"
    call = tiny.inputs(model, RAGGED)
    with patch(model, ATP) as handle:
        shake(handle.parts)
        want, record = model(**call).logits, handle.last
        handle.parts.save(path)
    with patch(model, f"atp(layers=(1, 2), weights='{path}')") as handle:
        assert torch.equal(model(**call).logits, want)
        assert handle.last.layer_tokens == record.layer_tokens
    with pytest.raises(ConfigError, match="made for"):
        patch(model, f"atp(layers=(2,), weights='{path}')")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="no usable weights"):
        patch(model, f"atp(layers=(1, 2), weights='{path}')")
    assert equalities.traces(model) == []


# --- what cannot be -------------------------------------------------------------------------------


def test_kernels_without_a_mask_are_refused_in_training_only() -> None:
    w = world("llava", "fake_flash")
    call = tiny.inputs(w.model, RAGGED)
    with patch(w.model, ATP) as handle, torch.no_grad():
        assert w.model(**call).logits.isfinite().all()
        handle.parts.train()
        with pytest.raises(UnsupportedModelError, match=r"kernel '.*' takes none that is learnt"):
            w.model(**call)


@torch.no_grad()
def test_a_cache_filled_under_soft_masks_is_refused() -> None:
    model = tiny.build("llava")
    call = tiny.inputs(model, RAGGED)
    with patch(model, ATP) as handle:
        handle.parts.train()
        cache = model(**call, use_cache=True).past_key_values
        with pytest.raises(CacheMismatchError, match=r"parts\.eval"):
            model(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)
        with pytest.raises(CacheMismatchError, match=r"parts\.eval"):
            model.generate(**call, **oracle.greedy(model))
        handle.parts.eval()
        assert model.generate(**call, **oracle.greedy(model)).shape[0] == 3


@pytest.mark.parametrize(
    ("method", "keep", "match"),
    [
        ("atp(layers=(1, 2)):0.5", None, "twice"),
        ("atp(layers=(1, 2))", 0.5, "own budget|twice"),
        ("atp(layers=(1, 3))", None, "does not exist"),
        ("atp(layers=(2, 1))", None, "ascend"),
        ("atp", None, "different"),
    ],
)
def test_bad_configurations_say_what_to_do(method: str, keep: Any, match: str) -> None:
    model = tiny.build("llava")
    with pytest.raises(ConfigError, match=match):
        patch(model, method, keep=keep)
    assert equalities.traces(model) == []
