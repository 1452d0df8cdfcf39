"""What a method makes of the time to the first token, on a model of a large shape.

The reference model is too small for times: most of its prefill is overhead. Times come from a model
with random weights, whose tensors have the shapes of a real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import torch

from eval_harness import machine
from eval_harness.clock import Clock
from eval_harness.rounds import Sample, interleave
from eval_harness.shapes import build, example_inputs, text_half
from eval_harness.stages import parts, timed_call
from vlmcompress.methods import pipeline

HOW = (
    "One prompt with one image, random weights. In one process, rounds run the unpatched model and "
    "the patched one in turns (every second round in reverse order) after warm-up rounds. TTFT is "
    "one prefill from the pixel tensor to the first token's logits. ttft_ratio is the median over "
    "rounds of patched by unpatched; ttft_range the smallest and largest. evidence_ms and "
    "selection_ms are medians of what the library's own clock saw: reading the tower's attention "
    "beside it, and choosing or merging tokens after it; methods inside the tower do both in its "
    "blocks, so theirs show in TTFT alone. A method that reads the question also embeds it in "
    "every call, by a text encoder of CLIP ViT-L/14's shape."
)
_QUESTION = "What is written on the sign to the left of the red door?"


@dataclass(frozen=True)
class SpeedPlan:
    """How methods are timed.

    Attributes:
        shape: one of `eval_harness.shapes.names()`.
        dtype: of the weights, by its name.
        keep: budget.
        rounds: that are timed. warmup: rounds thrown away.
        device: of the model.
    """

    shape: str = "llava-1.5-1b"
    dtype: str = "bfloat16"
    keep: float = 0.1
    rounds: int = 3
    warmup: int = 1
    device: str = "cpu"

    def identity(self) -> dict[str, Any]:
        """JSON-ready: what a time depends on besides machine and method."""
        return asdict(self)


def time_method(method: str, plan: SpeedPlan) -> dict[str, Any]:
    """Time one method against the unpatched model.

    Returns:
        `ttft_ratio`, `ttft_range`, `ttft_ms` (patched) and `unpatched_ms` (medians), `tokens`,
        `evidence_ms` and `selection_ms` (None where the method has no such stage), `machine`.
    """
    from vlmcompress import patch

    model, inputs = _model(plan.shape, plan.dtype, plan.device)
    text = pipeline.build(method, keep=1).needs().text
    clip = text_half(model) if text else None
    clock, found = Clock(model.device), parts(model)

    def prefill() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    def unpatched() -> Sample:
        with handle.disabled():
            return timed_call(prefill, found, clock)[0]

    def patched() -> Sample:
        sample = timed_call(prefill, found, clock)[0]
        return {**sample, **{f"reported_{k}": v for k, v in handle.last.times.items()}}

    where = machine.describe(model)
    handle: Any = patch(model, method, keep=plan.keep, clip=clip, question=_QUESTION)
    with handle:
        sides = {"unpatched": unpatched, "patched": patched}
        rows = interleave(sides, plan.rounds, plan.warmup)
        tokens = sum(handle.last.tokens_after)
    before, after = ([row["ttft"] for row in rows[side]] for side in sides)
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    inside = pipeline.build(method, keep=1).tower is not None
    return {
        "ttft_ratio": round(median(ratios), 4),
        "ttft_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "ttft_ms": _milliseconds(after),
        "unpatched_ms": _milliseconds(before),
        "tokens": tokens,
        "evidence_ms": _reported(rows["patched"], "evidence"),
        "selection_ms": None if inside else _reported(rows["patched"], "selection"),
        "machine": where,
    }


@lru_cache(maxsize=1)
def _model(shape: str, dtype: str, device: str) -> tuple[Any, Mapping[str, Any]]:
    model = build(shape, getattr(torch, dtype), device)
    return model, example_inputs(model)


def _reported(rows: list[Sample], stage: str) -> float | None:
    name = f"reported_{stage}"
    return _milliseconds([row[name] for row in rows]) if name in rows[0] else None


def _milliseconds(seconds: list[float]) -> float:
    return round(1000 * median(seconds), 3)
