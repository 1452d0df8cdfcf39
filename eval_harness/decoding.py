"""Times of one greedy generation, token by token.

TTFT ends with the logits of the first token, E2E when the last token is there. TPOT is
(E2E - TTFT) / (tokens - 1), per request; ITL are the gaps between consecutive tokens, pooled over
all requests. Throughput is all output tokens over the whole duration: input tokens are never
counted, for compression changes their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from eval_harness.clock import Clock
from eval_harness.rounds import summary
from eval_harness.stages import Parts, traced


@dataclass(frozen=True)
class Generation:
    """One generation in seconds, all from the tensors on the device.

    Attributes:
        ttft: to the logits of the first token.
        e2e: to the last token.
        gaps: between consecutive tokens.
        processor: what making the tensors took before; None where they were given.
    """

    ttft: float
    e2e: float
    gaps: tuple[float, ...]
    processor: float | None = None

    @property
    def tpot(self) -> float | None:
        """Per token after the first; None of a single token."""
        return (self.e2e - self.ttft) / len(self.gaps) if self.gaps else None


def generate_once(
    model: Any,
    inputs: Mapping[str, Any],
    parts: Parts,
    clock: Clock,
    new_tokens: int,
    processor: float | None = None,
) -> Generation:
    """Generate exactly `new_tokens` tokens greedily and take their times.

    Nothing waits for the device between tokens but the model's own loop.
    """
    clock.synchronize()
    with torch.no_grad(), traced(parts, clock) as trace:
        start = clock.mark()
        model.generate(
            **inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )
        end = clock.mark()
    clock.synchronize()
    tokens = [mark for _, mark in trace.marks["head"]]
    gaps = (clock.seconds(a, b) for a, b in pairwise(tokens))
    first, last = clock.seconds(start, tokens[0]), clock.seconds(start, end)
    return Generation(first, last, tuple(gaps), processor)


def summarize(runs: Sequence[Generation], new_tokens: int) -> dict[str, Any]:
    """JSON-ready: TTFT, E2E, TPOT, ITL in seconds and output tokens per second.

    `ttft_from_image` and `e2e_from_image` begin with the picture; None where tensors were given.
    `itl` is pooled over all runs. `tpot` and `itl` are None for a single token.
    """
    paces = [run.tpot for run in runs if run.tpot is not None]
    gaps = [gap for run in runs for gap in run.gaps]
    return {
        "new_tokens": new_tokens,
        "ttft": summary([run.ttft for run in runs]),
        "ttft_from_image": _from_image(runs, "ttft"),
        "e2e": summary([run.e2e for run in runs]),
        "e2e_from_image": _from_image(runs, "e2e"),
        "tpot": summary(paces) if paces else None,
        "itl": summary(gaps) if gaps else None,
        "output_tokens_per_second": new_tokens * len(runs) / sum(run.e2e for run in runs),
    }


def _from_image(runs: Sequence[Generation], name: str) -> dict[str, float] | None:
    seconds = [run.processor + getattr(run, name) for run in runs if run.processor is not None]
    return summary(seconds) if seconds else None
