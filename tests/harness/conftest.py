"""What tests of the harness share: an untrained model for the reference's scenes."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from eval_harness.sweep import run
from vlmcompress.reference.tokenizer import build_processor


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    small = {"num_hidden_layers": 5, "num_attention_heads": 2}
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, image_size=224, patch_size=16, **small
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **small,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=196,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LlavaForConditionalGeneration(config)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture
def go(model, processor):
    """Run a sweep on the untrained model."""

    def sweep(plan, folder, *, processor=processor, **options):
        return run.sweep(plan, folder, lambda team: (model, processor, None), **options)

    return sweep
