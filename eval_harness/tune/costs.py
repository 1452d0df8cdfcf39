"""What a pipeline costs beside the full model: time to the first token, or operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from eval_harness import flops
from eval_harness.clock import Clock
from eval_harness.rounds import Sample, interleave, timings
from eval_harness.stages import Parts, timed_call
from eval_harness.subject import NONE, under
from eval_harness.sweep.asker import Asked, Asker
from vlmcompress.core.errors import UnsupportedModelError


@dataclass(frozen=True)
class Meter:
    """Runs pipelines and the full model on the same requests.

    Attributes:
        asker: makes inputs; not entered.
        handle: of the patched model.
        parts: of the model.
        clock: of its device.
        requests: questions that are timed in turn.
    """

    asker: Asker
    handle: Any
    parts: Parts
    clock: Clock
    requests: Sequence[Asked]

    def time(self, spec: str, rounds: int, warmup: int) -> dict[str, Any]:
        """Rounds of the full model and a pipeline in turn (ABBA), from the picture.

        Returns:
            `shares` (pipeline over full model, round by round) and `seconds` of the pipeline;
            medians by stage of both as `stages` and `full_stages`, and `full_seconds`.

        Raises:
            VLMCompressError: where the library refuses the pipeline.
        """
        turns = {NONE: 0, spec: 0}

        def once(method: str) -> Sample:
            request = self.requests[turns[method] % len(self.requests)]
            turns[method] += 1
            return self._once(method, request)

        sides = {"baseline": lambda: once(NONE), "method": lambda: once(spec)}
        samples = interleave(sides, rounds, warmup)
        full, short = (
            [row["processor"] + row["ttft"] for row in samples[side]] for side in samples
        )
        wall = self.clock.kind == "wall"
        return {
            "shares": [b / a for a, b in zip(full, short, strict=True)],
            "seconds": short,
            "full_seconds": median(full),
            "stages": timings(samples, "method", wall)["stages"],
            "full_stages": timings(samples, "baseline", wall)["stages"],
        }

    def count(self, spec: str) -> dict[str, Any]:
        """Operations of a pipeline and of the full model, by formula.

        Returns:
            `share`, `flops` and `full_flops`.

        Raises:
            UnsupportedModelError: for a model or method without a formula.
            VLMCompressError: where the library refuses the pipeline.
        """
        counts = {method: self._counted(method, self.requests[0]) for method in (NONE, spec)}
        share = counts[spec] / counts[NONE]
        return {"share": share, "flops": counts[spec], "full_flops": counts[NONE]}

    def _once(self, method: str, request: Asked) -> Sample:
        made: list[Any] = []
        processor = self.clock.time(lambda: made.append(self._inputs(request)))
        with under(self.handle, method, None):
            sample, _, _ = timed_call(lambda: self._prefill(made[0]), self.parts, self.clock)
            reported = {} if method == NONE else self.handle.last.times
        return {
            **sample,
            "processor": processor,
            **{f"reported_{stage}": seconds for stage, seconds in reported.items()},
        }

    def _counted(self, method: str, request: Asked) -> int:
        inputs = self._inputs(request)
        with under(self.handle, method, None), torch.no_grad():
            _, trace, _ = timed_call(lambda: self._prefill(inputs), self.parts, self.clock, True)
            last = None if method == NONE else self.handle.last
            found = flops.of_call(
                self.asker.model.config,
                inputs,
                trace.connector_tokens,
                trace.embeddings.shape[1],
                last,
            )
        if found is None:
            what = "this model" if method == NONE else f"{method!r} on this model"
            raise UnsupportedModelError(
                f"There is no formula for the operations of {what}; use --cost ttft."
            )
        return found.total

    def _inputs(self, request: Asked) -> Any:
        return self.asker.batch([request], ()).inputs

    def _prefill(self, inputs: Any) -> Any:
        return self.asker.model(**inputs, use_cache=True, logits_to_keep=1)
