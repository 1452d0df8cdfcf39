"""Fitting a method to a model: attention statistics of sample prompts, and FitPrune's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from PIL import Image

from vlmcompress.core.costs import layered_flops
from vlmcompress.core.errors import UnsupportedModelError
from vlmcompress.families.decoders import decoder_of
from vlmcompress.live.patch import patch
from vlmcompress.methods.decoder.fitting import Cost, Fit, Sample, fit
from vlmcompress.methods.decoder.statistics import AttentionStatistics

Prompts = Iterable[tuple[Image.Image, str]]


def fitprune(
    model: Any,
    processor: Any,
    prompts: Prompts,
    budget: float,
    *,
    progress: Callable[[], object] = lambda: None,
) -> Fit:
    """The schedule of FitPrune for a model.

    Args:
        model: a vision-language model that is not patched; it is as before afterwards.
        processor: the model's.
        prompts: images with questions, such as the model is asked.
        budget: share of the prefill's FLOPs in the language model that is left, in (0, 1]. It is
            met by the prompts on average.
        progress: called after every prompt.

    Raises:
        UnsupportedModelError: for a language model whose FLOPs are not known, or whose layers
            cannot be halved.
        ConfigError: for no prompt, or a budget that cannot be met.
    """
    cost = cost_of(model)
    return fit(attention_statistics(model, processor, prompts, progress=progress), cost, budget)


@torch.no_grad()
def attention_statistics(
    model: Any,
    processor: Any,
    prompts: Prompts,
    *,
    progress: Callable[[], object] = lambda: None,
) -> list[Sample]:
    """What the visual tokens of each prompt receive in each layer.

    Args:
        model: see `fitprune`.
        processor: the model's.
        prompts: images with questions.
        progress: called after every prompt.
    """
    recorder, samples = AttentionStatistics(), []
    with patch(model, recorder):
        for image, question in prompts:
            inputs = processor(
                text=[prompt_of(processor, question)], images=[image], return_tensors="pt"
            )
            model(**inputs.to(model.device, model.dtype), logits_to_keep=1)
            samples += recorder.take()
            progress()
    return samples


def cost_of(model: Any) -> Cost:
    """FLOPs of a model's language model by the rows of its layers.

    Raises:
        UnsupportedModelError: when they are not known.
    """
    config = decoder_of(model).config

    def cost(lengths: Any) -> float:
        flops = layered_flops(config, lengths, logits=0)
        if flops is None:
            raise UnsupportedModelError(
                f"The FLOPs of a {config.model_type} are not known (experts or latent attention); "
                "write the schedule's shares by hand."
            )
        return float(flops)

    return cost


def prompt_of(processor: Any, question: str) -> str:
    """The text of a question about one image, by the processor's template where there is one."""
    if not getattr(processor, "chat_template", None):
        return f"{getattr(processor, 'image_token', '')}{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(turns, add_generation_prompt=True)
    return text
