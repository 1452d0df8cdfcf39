"""`transformers.pipeline`."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import pipeline

from vlmcompress import patch
from vlmcompress.reference import load

QUESTIONS = ("What colour is it?", "Is there a circle?")


def conversation(question):
    image = Image.effect_noise((100, 80), 80).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.mark.support('transformers.pipeline("image-text-to-text")')
@torch.no_grad()
def test_image_text_to_text(monkeypatch):
    """The reference model's pipeline, one by one and batched, answers as `generate` does."""
    model, processor = load()
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 6, "do_sample": False}
    turns = [conversation(question) for question in QUESTIONS]

    def answers(**batching):
        outputs = ask(text=turns, generate_kwargs=dict(options), **batching)
        return [output[0]["generated_text"][-1]["content"] for output in outputs]

    def generated():
        inputs = [
            processor.apply_chat_template(
                turn,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            for turn in turns
        ]
        ids = [model.generate(**i, **options)[0, i["input_ids"].shape[1] :] for i in inputs]
        return processor.batch_decode(ids, skip_special_tokens=True)

    full = answers()
    with patch(model, keep=1.0) as handle:
        assert answers() == full
        handle.set(keep=0.1)
        assert answers() == answers(batch_size=2) == generated()
        assert handle.last.tokens_after < handle.last.tokens_before
