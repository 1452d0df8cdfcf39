"""LLaVA-Mini end to end: compressed, fused with the text that has seen all of the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.seam import oracle
from tests.seam.equalities import traces
from tests.seam.singles import check_logits
from tests.seam.talk import Talk
from tests.seam.use_equalities import checkpoint
from tests.tiny import Prompt
from vlmcompress import ConfigError, UnsupportedInputError, UnsupportedModelError, patch
from vlmcompress.methods.prompt.llava_mini import Fusion, LLaVAMini

FAMILIES = ("llava", "llava_siglip", "qwen2_vl", "llava_next")
K, NEW = 4, 4
METHOD = LLaVAMini(tokens=K, fusion=2, heads=4)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def shaken(handle: Any) -> Any:
    """Parts that differ from what they were copied from, so that a mistake shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parts.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return handle


def patched(model: Any, method: LLaVAMini = METHOD, **more: Any) -> Any:
    return shaken(patch(model, method, **more))


# --- written out ---------------------------------------------------------------------------------


def fused_by_hand(model: Any, parts: Fusion, call: dict[str, Tensor], answers: int = 0) -> Tensor:
    """[1, L', d] what the language model is given of a prompt with one image.

    Args:
        model: a LLaVA.
        parts: trained parts.
        call: the prompt.
        answers: columns at its end that are no question.
    """
    tower = model.model.vision_tower(call["pixel_values"], output_hidden_states=True)
    read = tower.hidden_states[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        read = read[:, 1:]
    project = model.model.multi_modal_projector
    vision, compressed = project(read), project(parts.compressor(read, (5, 5))[0])
    ids = call["input_ids"]
    words = ids[0] != model.config.image_token_id
    start, text = int((~words).nonzero()[0]), model.get_input_embeddings()(ids[:, words])
    asked = text.shape[1] - answers
    rows = torch.cat([vision, compressed, text[:, :asked]], 1)
    llm = model.model.language_model
    where = torch.arange(rows.shape[1])[None]
    hidden = torch.full((rows.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
    turned = llm.rotary_emb(rows, position_ids=where)
    for layer in parts.prefusion_layers:
        rows = layer(rows, attention_mask=hidden, position_embeddings=turned)
    n = vision.shape[1]
    new, text = rows[:, n : n + K], torch.cat([rows[:, n + K :], text[:, asked:]], 1)
    return torch.cat([text[:, :start], new, text[:, start:]], 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_siglip"])
@pytest.mark.parametrize("answers", [0, 3])
def test_written_out(family, answers):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.ONE)
    labels = torch.full_like(call["input_ids"], -100)
    if answers:
        labels[:, -answers:] = call["input_ids"][:, -answers:]
    with patched(model, restore_length=False) as handle:
        got = model(**call, labels=labels).logits
        parts = handle.parts
        plain = model(**call).logits
    assert answers == 0 or (plain - got).abs().max() > 1e-3
    want = model(inputs_embeds=fused_by_hand(model, parts, call, answers)).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_fusion_layers_are_copies_of_the_first():
    """Untrained and uncompressed rows aside, they are the language model's own."""
    model = tiny.build("llava")
    with patch(model, METHOD) as handle:
        own = model.model.language_model.layers
        for copy, layer in zip(handle.parts.prefusion_layers, own, strict=False):
            assert type(copy) is type(layer)
            state = layer.state_dict()
            assert all(torch.equal(v, state[k]) for k, v in copy.state_dict().items())
            assert not any(p is q for p in copy.parameters() for q in layer.parameters())
        handle.set(positions="original")  # made anew from hooked layers, and thrown away
        patterns = [
            m for m in handle.parts.modules() if m._forward_pre_hooks or "forward" in m.__dict__
        ]
        assert not patterns


# --- what users do -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_is_singles(family, side):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED, padding=side)
    with patched(model):
        check_logits(model, call)


@torch.no_grad()
def test_rows_without_an_image_stay_as_they_are(family):
    model = tiny.build(family)
    call = tiny.inputs(model, (Prompt(1, 7), Prompt(0, 7)))
    before = model(**call).logits
    with patched(model):
        after = model(**call).logits
    rows = call["attention_mask"][1].bool()
    torch.testing.assert_close(after[1][rows], before[1][rows], atol=1e-5, rtol=0)
    assert (after[0, -1] - before[0, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_generation(family):
    """Cached, uncached, from an encoding, with beams and drafts; and nothing stays behind."""
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED)
    before, greedy = model(**call).logits, oracle.greedy(model, NEW)
    with patched(model) as handle:
        cached = model.generate(**call, **greedy)
        assert torch.equal(model.generate(**call, **greedy, use_cache=False), cached)
        encoded = handle.encode(**call)
        text = {k: v for k, v in call.items() if not k.startswith("pixel")}
        assert torch.equal(model.generate(**text, **greedy, mm_encoder_outputs=encoded), cached)
        one = {**greedy, "max_new_tokens": 1, "num_beams": 3, "num_return_sequences": 3}
        wide = model.generate(**call, **one)
        assert torch.equal(wide[::3, -1], cached[:, call["input_ids"].shape[1]])
        single = tiny.inputs(model, oracle.ONE)
        plain = model.generate(**single, **greedy)
        drafted = model.generate(**single, **greedy, prompt_lookup_num_tokens=2)
        assert torch.equal(drafted, plain)
        logits = model(**call).logits
        handle.set(method=LLaVAMini(tokens=K, fusion=0, heads=4))
        assert not torch.allclose(model(**call).logits, logits)
        with pytest.raises(UnsupportedInputError, match="fused"):
            model(**text, mm_encoder_outputs=encoded)
    assert traces(model) == []
    assert torch.equal(model(**call).logits, before)


@torch.no_grad()
def test_a_later_turn_is_fused_with_its_own_image(family):
    model = tiny.build(family)
    with patched(model) as handle:
        talk = Talk(model, rows=2)
        for seed, images in enumerate((1, 0, 1)):
            talk.say(images, 6, seed=seed)
            talk.answer()
            if images:
                assert handle.last.tokens_after[0] < handle.last.tokens_before[0]


def test_training(family, tmp_path):
    """Loss as without checkpointing; gradients reach every part, connector and language model."""
    model = tiny.build(family).train()
    call = tiny.inputs(model, oracle.MIXED)
    call["labels"] = call["input_ids"].clone()
    call["labels"][:, :-3] = -100
    losses = []
    with patched(model) as handle:
        for checkpointed in (False, True):
            if checkpointed:
                checkpoint(model)
            loss = model(**call).loss
            loss.backward()
            losses.append(loss.detach())
        silent = {
            name
            for name, p in handle.parts.named_parameters()
            if p.requires_grad and (p.grad is None or not bool(p.grad.abs().sum() > 0))
        }
        assert not silent
        touched = {n for n, p in model.named_parameters() if p.grad is not None}
        assert any("layers.0" in name for name in touched)
        assert not any(p is q for p in model.parameters() for q in handle.parts.parameters())
        torch.testing.assert_close(losses[0], losses[1])
        model.eval()
        path = str(tmp_path / "mini.safetensors")
        handle.parts.save(path)
        with torch.no_grad():
            want = model(**call).logits
    saved = LLaVAMini(tokens=K, fusion=2, heads=4, weights=path)
    with patch(model, saved), torch.no_grad():
        assert torch.equal(model(**call).logits, want)
    with pytest.raises(ConfigError, match="made for"):
        patch(model, LLaVAMini(tokens=K, fusion=1, heads=4, weights=path))


@torch.no_grad()
def test_compression_alone_and_pruning_inside_behind_it():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.MIXED)
    with patched(model, LLaVAMini(tokens=K, fusion=0, heads=4)) as handle:
        assert handle.parts.config["fusion"] == 0
        assert handle.encode(**call).encoded.whole == ()
        model(**call)
        assert handle.last.tokens_after == (K, K, K)
        alone = handle.last.prefill_flops
    with patched(model) as handle:
        model(**call)
        assert alone < handle.last.prefill_flops < handle.last.prefill_flops_before * 2
    with shaken(patch(model, [METHOD, "fastv@1:0.5"])) as handle:
        model(**call)
        assert handle.last.layer_lengths[-1] < handle.last.layer_lengths[0]


def test_what_cannot_be():
    model = tiny.build("llava")
    with pytest.raises(ConfigError, match="3"):
        patch(model, LLaVAMini(tokens=K, fusion=9))
    with pytest.raises(ConfigError, match="as a count"):
        patch(tiny.build("qwen2_vl"), "llava_mini", keep=0.5)
    ragged = tiny.build("qwen2_vl")
    call = tiny.inputs(ragged, (Prompt(images=2, text=5),), image_sizes=[(8, 12), (2, 2)])
    with patch(ragged, METHOD), pytest.raises(ConfigError, match="is to become 1"):
        ragged(**call)
    with patch(model, ["uniform:9", METHOD]), pytest.raises(ConfigError, match="put llava_mini"):
        model(**tiny.inputs(model, oracle.ONE))


def test_families_whose_layers_run():
    """Every family's layers can be copied and run by themselves."""
    for name in tiny.FAMILIES:
        model = tiny.build(name)
        call = tiny.inputs(model, oracle.ONE)
        if name == "ovis2":  # a distribution over a visual vocabulary of 69 is what is read
            with pytest.raises(UnsupportedModelError, match="69"):
                patched(model)
            continue
        with torch.no_grad(), patched(model) as handle:
            assert bool(model(**call).logits.isfinite().all()), name
            assert handle.last.tokens_after[0] < handle.last.tokens_before[0]
