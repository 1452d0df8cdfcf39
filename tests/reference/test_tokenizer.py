"""The tokenizer and the processor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmcompress.reference import prompt
from vlmcompress.reference.questions import ANSWERS
from vlmcompress.reference.tokenizer import build_processor, build_tokenizer

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def processor():
    return build_processor(TOKENIZER)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text or "<" in text


def test_vocabulary_is_small_and_the_same_every_time():
    assert len(TOKENIZER) <= 512
    assert build_tokenizer().get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize("answer", sorted({a for group in ANSWERS.values() for a in group}))
def test_answers_are_single_tokens(answer):
    assert len(TOKENIZER.encode(f" {answer}")) == 1


def test_chat_template(processor):
    assert prompt(processor, "What?") == "<user><image>What?<assistant>"
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "B?"}]},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == "<user><image>A?<assistant> red<eos><user>B?<assistant>"


def test_image_becomes_196_placeholders(processor):
    inputs = processor(
        images=Image.new("RGB", (300, 200)), text=prompt(processor, "What?"), return_tensors="pt"
    )
    image = TOKENIZER.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image).sum() == 196


def test_image_is_padded_never_squeezed(processor):
    """A wide picture keeps its proportions: mean colour above and below it."""
    wide = Image.new("RGB", (400, 200), (255, 0, 0))
    pixels = processor.image_processor(wide, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 224, 224)
    middle, edge = pixels[:, 112, 112], pixels[:, 10, 112]
    torch.testing.assert_close(edge, torch.zeros(3), atol=0.02, rtol=0)
    assert middle[0] > 1.5
    rows = (pixels[0, :, 112] > 1).sum()
    assert 108 <= rows <= 116
