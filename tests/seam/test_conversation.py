"""Several turns over a returned cache equal one uncached run; caches that do not fit raise."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import tiny
from tests.seam import matrix, oracle
from tests.seam.talk import Talk
from tests.tiny import Prompt
from vlmcompress import CacheMismatchError, PlaceholderMismatchError, patch

BOTH = pytest.mark.parametrize("positions", ["original", "contiguous"])


@BOTH
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_images_in_turns_one_and_three(family, positions):
    if reason := matrix.exempt("turns", family=family):
        pytest.skip(reason)
    model = tiny.build(family)
    talk = Talk(model)
    with patch(model, keep=0.25, positions=positions) as handle:
        for turn, (images, text) in enumerate([(2, 6), (0, 5), (1, 4)]):
            talk.say(images, text, seed=turn)
            whole = talk.answer_uncached()
            assert torch.equal(talk.answer(), whole), f"turn {turn}"
        record = handle.last
    per_image = tiny.tokens_per_image(model)
    full = talk.ids.shape[1] - 1
    dropped = 3 * (per_image - record.tokens_after[0])
    assert talk.cache.get_seq_length() == full - dropped


@BOTH
@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_batch_of_conversations(family, positions):
    model = tiny.build(family)
    talk = Talk(model, rows=3)
    with patch(model, keep=0.25, positions=positions):
        for turn, (images, text) in enumerate([(1, 6), (1, 5), (0, 4)]):
            talk.say(images, text, seed=turn)
            whole = talk.answer_uncached()
            assert torch.equal(talk.answer(), whole), f"turn {turn}"


@BOTH
@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "kimi_k25"])
def test_text_first_then_an_image(family, positions):
    model = tiny.build(family)
    talk = Talk(model)
    with patch(model, keep=0.25, positions=positions) as handle:
        talk.say(0, 6, seed=0)
        talk.answer()
        talk.say(1, 5, seed=1)
        whole = talk.answer_uncached()
        assert torch.equal(talk.answer(), whole)
        assert handle.last.tokens_after < handle.last.tokens_before


@BOTH
@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_other_settings_between_turns(family, positions):
    """What is in the cache stays; the next image is compressed by what holds then."""
    model = tiny.build(family)
    talk = Talk(model)
    with patch(model, keep=0.25, positions=positions) as handle:
        talk.say(1, 6, seed=0)
        talk.answer()
        handle.set(keep=0.5, positions="contiguous" if positions == "original" else "original")
        talk.say(1, 5, seed=1)
        talk.answer()
        assert handle.last.positions == positions
        n = tiny.tokens_per_image(model)
        assert handle.last.tokens_after[0] == int(n * 0.5 + 0.5)
        before, answered = talk.cache.get_seq_length(), talk.ids.shape[1]
        with handle.disabled():
            talk.say(1, 5, seed=2)
            talk.answer(2)
        # Nothing was dropped: every id since then was fed, and the last answer's last token.
        assert talk.cache.get_seq_length() == before + talk.ids.shape[1] - answered


@BOTH
@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "kimi_k25"])
def test_plain_forwards_with_a_second_image(family, positions):
    model = tiny.build(family)
    first = tiny.inputs(model, [Prompt(1, 6)], seed=0)
    later = tiny.inputs(model, [Prompt(1, 5)], seed=1)
    by_image = ("pixel", "image")
    both = {k: torch.cat([first[k], later[k]], 0 if k.startswith(by_image) else 1) for k in first}
    with patch(model, keep=0.25, positions=positions):
        want = model(**both).logits[:, first["input_ids"].shape[1] :]
        out = model(**first, use_cache=True)
        mask = both["attention_mask"]
        got = model(
            **{**later, "attention_mask": mask}, past_key_values=out.past_key_values, use_cache=True
        ).logits
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-5


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused():
    model, other = tiny.build("llava"), tiny.build("llava", seed=1)
    talk = Talk(model, rows=2)
    with patch(model, keep=0.25), patch(other, keep=0.25):
        talk.say(1, 6, seed=0)
        talk.answer()
        talk.say(0, 4, seed=1)
        good, cache = talk.ids, talk.cache
        talk.cache = copy.deepcopy(cache)
        talk.ids = good.flip(0)
        with pytest.raises(CacheMismatchError, match="another order"):
            talk.answer()
        talk.ids = good[:, :9]
        with pytest.raises(CacheMismatchError, match="columns"):
            talk.answer()
        talk.ids, talk.model = good, other
        with pytest.raises(CacheMismatchError, match="another model"):
            talk.answer()
        talk.model = model
        one_row = {"input_ids": good[:1, -1:], "past_key_values": talk.cache}
        with pytest.raises(CacheMismatchError, match="2 rows"):
            model(**one_row)
        talk.cache.crop(-(talk.cache.get_seq_length() - 3))
        with pytest.raises(CacheMismatchError, match="cropped"):
            talk.answer()
        talk.cache = cache
        wrong = tiny.inputs(model, [Prompt(1, 4)], seed=3)
        talk.new = {"pixel_values": wrong["pixel_values"]}
        with pytest.raises(PlaceholderMismatchError, match="new turn"):
            talk.answer()
        talk.new = {}
        talk.answer()


@BOTH
@torch.no_grad()
def test_one_encoding_many_questions_and_then_a_conversation(positions):
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    with patch(model, keep=0.25, positions=positions) as handle:
        encoding = handle.encode(**call)
        rest = {k: v for k, v in call.items() if k != "pixel_values"}
        arguments = {**oracle.greedy(model), "return_dict_in_generate": True}
        turn = model.generate(**rest, mm_encoder_outputs=encoding, **arguments)
        ids = torch.cat([turn.sequences, torch.tensor([[7, 8]])], 1)
        later = model.generate(input_ids=ids, past_key_values=turn.past_key_values, **arguments)
        whole = model.generate(
            input_ids=ids, mm_encoder_outputs=encoding, **oracle.greedy(model), use_cache=False
        )
    assert torch.equal(later.sequences, whole)
