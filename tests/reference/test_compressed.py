"""The shipped model under compression: answers, the pipeline, text-aware pieces, pictures."""

from __future__ import annotations

import pytest
import torch
from transformers import pipeline

from eval_harness import evaluate
from vlmcompress import patch, reference
from vlmcompress.reference import samples


@pytest.fixture(scope="module")
def model_and_processor():
    return reference.load()


def test_cls_pruning_keeps_what_random_loses(model_and_processor):
    results = evaluate(
        *model_and_processor,
        list(samples("test", 240)),
        methods=["vtc_cls", "fastervlm", "random", "oracle_asked", "anti_oracle"],
        keeps=[0.1],
        seed=0,
    )
    at = results["accuracy"]["0.1"]
    assert results["full"]["mean"] > 0.8
    for method in ("vtc_cls", "fastervlm"):
        assert at[method]["low"] > at["random"]["high"]
        assert at[method]["mean"] > results["full"]["mean"] - 0.1
    assert at["oracle_asked"]["mean"] > at["anti_oracle"]["mean"] + 0.2
    assert results["blind"] < 0.5


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_transformers_pipeline(model_and_processor, batch_size):
    model, processor = model_and_processor
    asked = list(samples("test", 8))
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": s.image},
                    {"type": "text", "text": s.question},
                ],
            }
        ]
        for s in asked
    ]
    with patch(model, keep=0.1, processor=processor) as handle:
        ask = pipeline("image-text-to-text", model=model, processor=processor)
        answers = ask(
            text=chats,
            batch_size=batch_size,
            return_full_text=False,
            generate_kwargs={"do_sample": False, "max_new_tokens": 4},
        )
        assert handle.last.tokens_after == (20,) * len(handle.last.tokens_after)
    texts = [
        a[0]["generated_text"] if isinstance(a, list) else a["generated_text"] for a in answers
    ]
    right = sum(t.strip().lower() == s.answer for t, s in zip(texts, asked, strict=True))
    assert right >= 5


@torch.no_grad()
def test_overlay_shows_the_scene_and_what_was_kept(model_and_processor):
    model, processor = model_and_processor
    (sample,) = samples("test", 1)
    text = reference.prompt(processor, sample.question)
    inputs = processor(images=sample.image, text=text, return_tensors="pt")
    with patch(model, keep=0.1, processor=processor) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        picture, report = handle.overlay(sample.image), str(handle.report)
    assert picture.size == (224, 224)
    assert report.startswith("196 -> 20 tokens/image")
