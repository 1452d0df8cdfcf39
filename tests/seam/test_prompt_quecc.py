"""QueCC end to end: whose question, which rows, and what the language model reads at last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.seam import oracle
from tests.seam.equalities import traces
from tests.seam.singles import check_logits, singles
from tests.seam.worlds import Letters
from tests.tiny import Prompt
from vlmcompress import EvidenceError, MissingTextError, patch
from vlmcompress.families import family_of
from vlmcompress.methods.ops.windows import middles
from vlmcompress.methods.prompt.quecc import QueCC, QueryCondenser

FAMILIES = ("llava", "llava_siglip", "qwen2_vl", "llava_next")
METHOD = QueCC(tokens=4, layers=(0, 2, -3, -2))
QUESTION = "what is that?"
NEW = 4


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def patched(model: Any, method: Any = METHOD, question: Any = QUESTION, **more: Any) -> Any:
    return patch(model, method, processor=Letters(), question=question, **more)


def question_vector(model: Any, text: str) -> Tensor:
    """What the unpatched language model makes of a text."""
    ids = torch.tensor([Letters()(text)["input_ids"]])
    return model.model.language_model(input_ids=ids).last_hidden_state[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_siglip"])
def test_quecc_written_out(family):
    """Tower, condenser, connector and prompt by hand."""
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.ONE)
    tower = model.model.vision_tower(call["pixel_values"], output_hidden_states=True)
    first = int(family_of(model).tower(model.base_model).has_cls)
    states = [h[:, first:] for h in tower.hidden_states[1:]]
    read = states[model.config.vision_feature_layer]
    about = question_vector(model, QUESTION)
    with patched(model, restore_length=False) as handle:
        parts = handle.parts
        got = model(**call).logits
        assert torch.equal(handle.kept[0], middles((5, 5), (2, 2)))
    assert isinstance(parts, QueryCondenser)
    levels = torch.cat([states[i] for i in (0, 2, -3, -2)], -1)
    rows = model.model.multi_modal_projector(parts(read, levels, about, (5, 5), (2, 2)))
    ids = call["input_ids"]
    embedded = model.get_input_embeddings()(ids)[0]
    text = ids[0] != model.config.image_token_id
    start = int((~text).nonzero()[0])
    prompt = torch.cat([embedded[:start], rows[0], embedded[text][start:]])[None]
    want = model(inputs_embeds=prompt).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_row_has_its_own_question(family):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED)
    questions = ["one?", "another, longer one", "none"]
    with patched(model, question=None) as handle:
        together = model(**call, question=questions).logits
        for b, single in singles(model, call):
            if not oracle.MIXED[b].images:
                continue
            alone = model(**single, question=questions[b]).logits
            rows = call["attention_mask"][b].bool()
            torch.testing.assert_close(together[b][rows], alone[0], atol=2e-5, rtol=0)
            other = model(**single, question="something else").logits
            assert (other - alone).abs().max() > 1e-3
        assert handle.last.tokens_after[0] < handle.last.tokens_before[0]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_both_paddings_say_the_same(family, side):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED, padding=side)
    with patched(model):
        check_logits(model, call)


@torch.no_grad()
def test_cached_is_uncached_and_remove_restores(family):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED)
    before = model(**call).logits
    greedy = oracle.greedy(model, NEW)
    with patched(model) as handle:
        cached = model.generate(**call, **greedy)
        assert torch.equal(model.generate(**call, **greedy, use_cache=False), cached)
        encoded = handle.encode(**call)
        text = {k: v for k, v in call.items() if not k.startswith("pixel")}
        assert torch.equal(model.generate(**text, **greedy, mm_encoder_outputs=encoded), cached)
        beams = model.generate(**call, **{**greedy, "num_beams": 2})
        assert beams.shape[0] == len(cached)
    assert traces(model) == []
    assert torch.equal(model(**call).logits, before)


def test_parts_learn_and_are_saved(family, tmp_path):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED)
    call["labels"] = call["input_ids"]
    path = str(tmp_path / "quecc.safetensors")
    with patched(model) as handle:
        handle.model.train()
        model(**call).loss.backward()
        grads = {n: p.grad for n, p in handle.parts.named_parameters()}
        silent = {n for n, g in grads.items() if g is None or not bool(g.abs().sum() > 0)}
        assert not silent - {"clip_attn.in_proj_bias"}
        model.eval()
        handle.parts.save(path)
        want = model(**call).logits
    with patched(model, QueCC(tokens=4, layers=(0, 2, -3, -2), seed=3)):
        assert not torch.equal(model(**call).logits, want)
    with patched(model, QueCC(tokens=4, layers=(0, 2, -3, -2), seed=3, weights=path)):
        assert torch.equal(model(**call).logits, want)


@torch.no_grad()
def test_the_question_is_read_once_and_alone():
    """One batch for all distinct questions, no cache, and none of what is done to the layers."""
    model = tiny.build("llava")
    call = tiny.inputs(model, (Prompt(2, 7), Prompt(1, 6), Prompt(1, 6), Prompt(0, 5)))
    seen: list[dict[str, Any]] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with patched(model, [METHOD, "fastv@1:0.5"], question=None) as handle:
        model(**call, question=["a", "bc", "a", "unasked"])
        assert handle.last.layer_lengths[-1] < handle.last.layer_lengths[0]
    hook.remove()
    reading, prompt = seen
    assert [int(row.sum()) for row in reading["attention_mask"]] == [2, 3]
    assert reading["use_cache"] is False
    assert prompt["inputs_embeds"].shape[0] == 4


def test_shares_of_depth_that_are_one_layer():
    """Six layers have three of the four published ones."""
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    with patched(model, "quecc", keep=4) as handle, torch.no_grad():
        model(**call)
        assert handle.parts.config["deep"] == 3 * 32


@torch.no_grad()
def test_what_is_missing():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    with patch(model, METHOD, question="?"), pytest.raises(MissingTextError, match="tokenizer"):
        model(**call)
    with patched(model, question=" "), pytest.raises(MissingTextError, match="no question"):
        model(**call)
    with pytest.raises(EvidenceError, match="cannot be read"):
        patched(tiny.build("llava_pixtral"))
