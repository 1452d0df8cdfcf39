"""One call of a model's `generate`, with what the model read and wrote and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from eval_harness.sweep.asker import lengths
from vlmcompress.core.report import CallRecord
from vlmcompress.live.timing import Stopwatch

_FIRST, _ALL = "first", "all"


@dataclass(frozen=True)
class Generated:
    """What came of one call.

    Attributes:
        ids: [B, T] generated, on the CPU.
        read: tokens of each prompt that entered the language model, without padding.
        written: tokens of each answer, the end included.
        ttft: seconds from the inputs on the device to the first token's logits (model TTFT).
        seconds: of all of the call.
    """

    ids: Tensor
    read: list[int]
    written: list[int]
    ttft: float
    seconds: float


def generate(model: Any, handle: Any, inputs: Any, **how: Any) -> Generated:
    """Generate one answer per prompt.

    Args:
        model: on the device of the inputs.
        handle: of its patch; None without one.
        inputs: of a processor, padded on the left.
        how: further arguments of the model's `generate`.
    """
    before = handle.last if handle else None
    watch = Stopwatch(model.device)
    start = watch.mark()
    first = LogitsProcessorList([_FirstLogits(watch, start)])
    with torch.no_grad():
        ids = model.generate(**inputs, logits_processor=first, **how)
    watch.add(_ALL, start, watch.mark())
    last = handle.last if handle else None
    prompt, whole = inputs["input_ids"], inputs["attention_mask"].sum(1).tolist()
    visual = (prompt == model.config.image_token_id).sum(1).tolist()
    dropped = dropped_of(None if last is before else last, visual)
    new, seconds = ids[:, prompt.shape[1] :].cpu(), watch.seconds()
    return Generated(
        ids=new,
        read=[n - gone for n, gone in zip(whole, dropped, strict=True)],
        written=lengths(new, model.generation_config.eos_token_id),
        ttft=seconds[_FIRST],
        seconds=seconds[_ALL],
    )


class _FirstLogits(LogitsProcessor):
    """Leaves scores as they are and marks the moment when the first ones are there."""

    def __init__(self, watch: Stopwatch, start: Any) -> None:
        self._watch, self._start, self._seen = watch, start, False

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        if not self._seen:
            self._watch.add(_FIRST, self._start, self._watch.mark())
            self._seen = True
        return scores


def dropped_of(record: CallRecord | None, visual: Sequence[int]) -> list[int]:
    """Visual tokens of each prompt that did not enter the language model.

    Args:
        record: of the call; None where nothing was compressed.
        visual: placeholders in each prompt, which its images fill in order.
    """
    if record is None:
        return [0] * len(visual)
    images = zip(record.tokens_before, record.tokens_after, strict=True)
    dropped = []
    for placeholders in visual:
        filled = kept = 0
        while filled < placeholders:
            before, after = next(images)
            filled, kept = filled + before, kept + after
        dropped.append(placeholders - kept)
    return dropped
