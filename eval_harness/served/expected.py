"""What transformers answers, with the margin of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmcompress import patch

if TYPE_CHECKING:  # it wants what only an engine's environment has
    from eval_harness.served.asking import Prompt

#: Deviation of noise in pixels, some ten times the spacing of float32 there, and how often it is
#: drawn.
_NOISE, _DRAWS = 1e-6, 32


@dataclass(frozen=True)
class Expected:
    """A greedy answer of the patched model.

    Attributes:
        tokens: ids of the answer.
        margins: between the two best logits of each step.
        prompt_tokens: of the prompt that the language model has seen.
        full_tokens: of the caller's prompt.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    prompt_tokens: int
    full_tokens: int

    def close_until(self, limit: float) -> int:
        """Steps before the first whose two best logits are closer than `limit`."""
        return next((i for i, gap in enumerate(self.margins) if gap < limit), len(self.margins))


def answers(
    folder: Path, prompts: Sequence[Prompt], spec: str | None, new_tokens: int
) -> list[Expected]:
    """Answers of a model in float32, prompt by prompt, none of them ended early.

    Args:
        folder: of the model.
        prompts: asked.
        spec: method and budget; None for the unpatched model.
        new_tokens: at most, in each answer.
    """
    model, processor = _loaded(folder)
    model.generation_config.eos_token_id = None
    handle = None if spec is None else patch(model, spec, positions="contiguous")
    return [_answer(model, processor, handle, prompt, new_tokens) for prompt in prompts]


def by_rounding(
    folder: Path, prompt: Prompt, spec: str, new_tokens: int, tokens: Sequence[int]
) -> bool:
    """Whether an answer other than that of `answers` comes of rounding.

    A method's choice can hang on distances that are equal but for rounding: starts of clusters, for
    one. Then the patched model gives that answer too, when its pixels change by some units in the
    last place of float32.
    """
    model, processor = _loaded(folder)
    model.generation_config.eos_token_id = None
    draw = torch.Generator().manual_seed(0)
    with patch(model, spec, positions="contiguous") as handle:
        found = (
            _answer(model, processor, handle, prompt, new_tokens, draw).tokens
            for _ in range(_DRAWS)
        )
        return tuple(tokens) in found


@torch.no_grad()
def encoded(folder: Path, prompt: Prompt, spec: str) -> Tensor:
    """[k, d] rows of a prompt's only picture as the patched model's language model gets them."""
    model, processor = _loaded(folder)
    with patch(model, spec) as handle:
        text = processor.image_token
        inputs = processor(text=text, images=list(prompt.images), return_tensors="pt")
        rows: Tensor = handle.encode(**inputs)["image"].pooler_output[0]
    return rows


def _loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def _answer(
    model: Any,
    processor: Any,
    handle: Any,
    prompt: Prompt,
    new_tokens: int,
    noise: torch.Generator | None = None,
) -> Expected:
    parts = [{"type": "image"} for _ in prompt.images]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": prompt.question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    images = list(prompt.images) or None
    inputs = processor(text=text, images=images, return_tensors="pt")
    if noise is not None:
        pixels = inputs["pixel_values"]
        inputs["pixel_values"] = pixels + _NOISE * torch.randn(pixels.shape, generator=noise)
    made = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(made.logits)[:, 0].topk(2).values
    full = inputs["input_ids"].shape[1]
    seen = full if handle is None or not prompt.images else handle.last.short_length
    return Expected(
        tuple(made.sequences[0, full:].tolist()),
        tuple((best[:, 0] - best[:, 1]).tolist()),
        seen,
        full,
    )
