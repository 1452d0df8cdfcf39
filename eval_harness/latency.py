"""Latency of a patched model against the same model unpatched, interleaved in one process.

Definitions: TTFT is one `model(**inputs, use_cache=True, logits_to_keep=1)`, from the pixel tensor
on the device to the first token's logits. TPOT is the time between the first and the last token's
logits of one greedy `generate`, per token after the first. The floor is the tower alone
(`get_image_features`, all layers) plus the prefill of the shortened sequence alone; the floor ratio
says how far a method's TTFT is from it (skipping tower layers that nobody reads can give less than
1). The ideal of a method inside the language model is each layer alone at its own length. Ratios
are medians of ratios taken within one round. "Unpatched" is `handle.disabled()`: the model's own
path, with idle hooks on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval_harness import flops, machine
from eval_harness.clock import Clock, ClockKind
from eval_harness.floor import layers_alone, prefill_alone, tower_alone
from eval_harness.rounds import (
    Sample,
    Side,
    against_floor,
    against_ideal,
    evidence,
    interleave,
    timings,
)
from eval_harness.stages import Parts, Trace, parts, timed_call, traced
from vlmcompress.core.costs import cache_bytes
from vlmcompress.core.errors import ConfigError

DEFAULT = ("vtc_cls", 0.1)
"""The configuration whose floor ratio stands at the top of the results."""

_NO_EVIDENCE = "uniform"  # a method that looks at nothing
_DECODE_REPEATS = 3

Keep: TypeAlias = float | int | str


def bench(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    configs: Sequence[tuple[str, Keep]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    new_tokens: int = 16,
    progress: Callable[[str], None] | None = None,
    clock: ClockKind = "wall",
) -> dict[str, Any]:
    """Time each configuration against the unpatched model.

    Args:
        model: an unpatched VLM; unpatched again afterwards.
        inputs: what the processor returns, on the model's device.
        configs: (method, keep) pairs.
        repeats: timed rounds; each runs every side once, in an order that alternates.
        warmup: rounds that are thrown away.
        new_tokens: length of the generation that TPOT is taken from; below 2 it is not measured.
        progress: called with a line of text now and then.
        clock: `wall`, or `cpu` for processor time, which a busy machine disturbs less (one thread,
            on CPU; what `reported` holds is wall time all the same).

    Returns:
        JSON-ready: `machine`, `protocol`, `floor_ratio` (of `DEFAULT`; None when it is not among
        `configs`) and `configs`, one entry per pair: times in seconds, memory in bytes, FLOPs.

    Raises:
        ConfigError: without configurations or rounds.
        UnsupportedModelError: when the model's stages cannot be told apart.
    """
    if not configs or repeats < 1 or warmup < 0:
        raise ConfigError(
            f"bench needs configurations, repeats >= 1 and warmup >= 0; got {len(configs)} "
            f"configurations, repeats={repeats}, warmup={warmup}."
        )
    from vlmcompress import patch

    say = progress or (lambda line: None)
    timer, found = Clock(model.device, clock), parts(model)
    where = machine.describe(model)
    rows = []
    with patch(model, configs[0][0], keep=configs[0][1]) as handle:
        for method, keep in configs:
            say(f"{method} at keep {keep}")
            one = _Bench(model, inputs, handle, timer, found, method, keep)
            rows.append(one.run(repeats, warmup, new_tokens))
            say(f"{method} at keep {keep}: floor ratio {rows[-1]['floor_ratio']:.3f}")
    return {
        "machine": where,
        "protocol": {
            "repeats": repeats,
            "warmup": warmup,
            "new_tokens": new_tokens,
            "clock": clock,
        },
        "floor_ratio": next(
            (r["floor_ratio"] for r in rows if (r["method"], r["keep"]) == DEFAULT), None
        ),
        "configs": rows,
    }


@dataclass(frozen=True)
class _Bench:
    """The sides of one configuration's comparison."""

    model: Any
    inputs: dict[str, Tensor]
    handle: Any
    clock: Clock
    parts: Parts
    method: str
    keep: Keep

    def run(self, repeats: int, warmup: int, new_tokens: int) -> dict[str, Any]:
        """Everything that is reported of this configuration."""
        before, after = self._probe(patched=False), self._probe(patched=True)
        samples = interleave(self._sides(after), repeats, warmup)
        tpot = self._tpot(new_tokens)
        return {
            "method": self.method,
            "keep": self.keep,
            **timings(samples),
            **against_floor(samples),
            **against_ideal(samples),
            "evidence": evidence(samples),
            "tpot": tpot["method"],
            **after.facts,
            "baseline": {**timings(samples, "baseline"), "tpot": tpot["baseline"], **before.facts},
        }

    def _prefill(self) -> Any:
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    def _probe(self, patched: bool) -> _Probe:
        """One untimed prefill that tells shapes, cache and memory."""
        with self._patched() if patched else self.handle.disabled(), torch.no_grad():
            _, trace, output = timed_call(self._prefill, self.parts, self.clock, True)
            last = self.handle.last if patched else None
            kept = None if last is None else last.kept
            peak = self.clock.peak_memory(self._prefill)
        facts = {
            "tokens": self._image_tokens() if kept is None else sum(len(k) for k in kept),
            "prompt_tokens": trace.embeddings.shape[1],
            "kv_bytes": cache_bytes(output.past_key_values),
            "peak_memory_bytes": peak,
            "flops": self._flops(trace, last),
            "tokens_in_layers": None if last is None else [sum(n) for n in last.layer_tokens],
        }
        lengths = () if last is None else last.layer_lengths
        return _Probe(facts, trace.embeddings, [attention for attention, _ in lengths])

    @contextmanager
    def _patched(self) -> Iterator[None]:
        self.handle.set(method=self.method, keep=self.keep)
        yield

    def _image_tokens(self) -> int:
        return int((self.inputs["input_ids"] == self.model.config.image_token_id).sum())

    def _flops(self, trace: Trace, last: Any) -> dict[str, int] | None:
        config = self.model.config
        if config.model_type != "llava" or "clip" not in config.vision_config.model_type:
            return None
        return flops.prefill(
            config,
            images=self.inputs["pixel_values"].shape[0],
            connector_tokens=trace.connector_tokens,
            prompt_tokens=trace.embeddings.shape[1],
            tower_layers=config.vision_config.num_hidden_layers
            - (0 if last is None else last.skipped_layers),
            layers=() if last is None else last.layer_lengths,
        ).to_dict()

    def _sides(self, probe: _Probe) -> dict[str, Side]:
        short = probe.embeddings
        sides: dict[str, Side] = {
            "baseline": self._baseline,
            "tower_alone": self._tower_alone,
            "method": lambda: self._as(self.method),
            "prefill_alone": lambda: self._prefill_alone(short),
        }
        if probe.lengths:
            sides["layers_alone"] = lambda: self._layers_alone(short, probe.lengths)
        if self._looks_at_the_tower():
            sides["no_evidence"] = lambda: self._as(_NO_EVIDENCE)
        return sides

    def _looks_at_the_tower(self) -> bool:
        from vlmcompress.methods import registry

        known = isinstance(self.method, str) and self.method in registry.names()
        return known and registry.create(self.method).needs().attention

    def _baseline(self) -> Sample:
        with self.handle.disabled():
            return timed_call(self._prefill, self.parts, self.clock)[0]

    def _as(self, method: str) -> Sample:
        self.handle.set(method=method, keep=self.keep)
        sample, _, _ = timed_call(self._prefill, self.parts, self.clock)
        reported = {f"reported_{k}": v for k, v in self.handle.last.times.items()}
        return {**sample, **reported}

    def _tower_alone(self) -> Sample:
        with self.handle.disabled():
            return {"seconds": tower_alone(self.model, self.inputs, self.clock)}

    def _prefill_alone(self, embeddings: Tensor) -> Sample:
        with self.handle.disabled():
            return {"seconds": prefill_alone(self.parts, embeddings, self.clock)}

    def _layers_alone(self, embeddings: Tensor, lengths: Sequence[int]) -> Sample:
        with self.handle.disabled():
            return {"seconds": layers_alone(self.parts, embeddings, lengths, self.clock)}

    def _tpot(self, new_tokens: int) -> dict[str, float | None]:
        if new_tokens < 2:
            return {"baseline": None, "method": None}
        sides: dict[str, Side] = {
            "baseline": lambda: self._decode(new_tokens, self.handle.disabled()),
            "method": lambda: self._decode(new_tokens, self._patched()),
        }
        samples = interleave(sides, _DECODE_REPEATS, 1)
        return {name: median(s["tpot"] for s in rows) for name, rows in samples.items()}

    def _decode(self, new_tokens: int, context: Any) -> Sample:
        with context, torch.no_grad(), traced(self.parts, self.clock) as trace:
            self.clock.synchronize()
            self.model.generate(
                **self.inputs,
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            )
        self.clock.synchronize()
        ends = [end for _, end in trace.marks["head"]]
        return {"tpot": self.clock.seconds(ends[0], ends[-1]) / (len(ends) - 1)}


@dataclass(frozen=True)
class _Probe:
    facts: dict[str, Any]
    embeddings: Tensor
    lengths: Sequence[int]
