"""Latency of a patched model against the same model unpatched, interleaved in one process.

Definitions: model TTFT is one `model(**inputs, use_cache=True, logits_to_keep=1)`, from the tensors
on the device to the first token's logits; TTFT from the image is the processor before it and the
copy to the device besides. Stages sum to them. TPOT, ITL and E2E are those of `decoding`. The floor
is the tower alone (`get_image_features`, all layers) plus the prefill of the shortened sequence
alone; the floor ratio says how far a method's TTFT is from it (skipping tower layers that nobody
reads can give less than 1). The ideal of the prefill is each layer of the language model alone at
its own length. Ratios are medians of ratios taken within one round. "Unpatched" is
`handle.disabled()`: the model's own path, with idle hooks on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval_harness import counted, decoding, flops, machine
from eval_harness.clock import Clock, ClockKind
from eval_harness.decoding import Generation
from eval_harness.floor import has_layers, layers_alone, prefill_alone, tower_alone
from eval_harness.requests import Request
from eval_harness.rounds import (
    Sample,
    Side,
    against_floor,
    against_ideal,
    evidence,
    interleave,
    timings,
)
from eval_harness.stages import Parts, Trace, parts, timed_call
from eval_harness.subject import NONE, Keep, Subject, off, under
from vlmcompress.core.costs import cache_bytes
from vlmcompress.core.errors import ConfigError

DEFAULT = ("vtc_cls", 0.1)
"""The configuration whose floor ratio stands at the top of the results."""

_NO_EVIDENCE = "uniform"  # a method that looks at nothing


def bench(
    model: PreTrainedModel,
    inputs: dict[str, Tensor] | Request,
    configs: Sequence[tuple[str, Keep]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    new_tokens: int = 16,
    count: bool = False,
    clip: Any = None,
    progress: Callable[[str], None] | None = None,
    clock: ClockKind = "wall",
) -> dict[str, Any]:
    """Time each configuration against the unpatched model.

    Args:
        model: an unpatched VLM; unpatched again afterwards.
        inputs: a request, whose processor is timed too, or what a processor returned, on the
            model's device.
        configs: (method, keep) pairs; the method `none` is the unpatched model once more.
        repeats: timed rounds; each runs every side once, in an order that alternates.
        warmup: rounds that are thrown away.
        new_tokens: length of the generations that TPOT, ITL and E2E are taken from; below 2 they
            are not measured.
        count: whether operations are counted by torch beside the formula, which costs one prefill
            under eager attention for each configuration and one without.
        clip: as `patch` takes it, for methods that read the question.
        progress: called with a line of text now and then.
        clock: `wall`, or `cpu` for processor time, which a busy machine disturbs less (one thread,
            on CPU; what `reported` holds is wall time all the same, so that evidence is not told
            apart from the tower nor the selection from the rest).

    Returns:
        JSON-ready: `machine`, `protocol`, `request`, `floor_ratio` (of `DEFAULT`; None when it is
        not among `configs`) and `configs`, one entry per pair: times in seconds, memory in bytes,
        FLOPs.

    Raises:
        ConfigError: without configurations or rounds.
        UnsupportedModelError: when the model's stages cannot be told apart, or the library cannot
            compress it.
    """
    if not configs or repeats < 1 or warmup < 0:
        raise ConfigError(
            f"bench needs configurations, repeats >= 1 and warmup >= 0; got {len(configs)} "
            f"configurations, repeats={repeats}, warmup={warmup}."
        )
    say = progress or (lambda line: None)
    subject = Subject(model, inputs, Clock(model.device, clock), parts(model), clip)
    where = machine.describe(model)
    counts = _counts(subject, configs) if count else [None] * (1 + len(configs))
    rows = []
    with subject.patched(configs) as handle:
        for (method, keep), found in zip(configs, counts[1:], strict=True):
            say(f"{method} at keep {keep}")
            one = _Bench(subject, handle, method, keep)
            row = one.run(repeats, warmup, new_tokens)
            row["flops_counted"], row["baseline"]["flops_counted"] = found, counts[0]
            rows.append(row)
            say(f"{method} at keep {keep}: floor ratio {row['floor_ratio']:.3f}")
    return {
        "machine": where,
        "protocol": {
            "repeats": repeats,
            "warmup": warmup,
            "new_tokens": new_tokens,
            "clock": clock,
        },
        "request": subject.describe(),
        "floor_ratio": next(
            (r["floor_ratio"] for r in rows if (r["method"], r["keep"]) == DEFAULT), None
        ),
        "configs": rows,
    }


def _counts(
    subject: Subject, configs: Sequence[tuple[str, Keep]]
) -> Sequence[dict[str, int] | None]:
    """Operations that torch counts: of the unpatched model, then of every configuration."""
    inputs, device = subject.inputs(), subject.model.device
    found = []
    with counted.eager_attention(subject.model), subject.patched(configs) as handle:
        for method, keep in [(NONE, None), *configs]:
            with under(handle, method, keep):
                call = lambda: subject.prefill(inputs)  # noqa: E731
                found.append(counted.count(call, subject.parts, device))
    return found


@dataclass(frozen=True)
class _Bench:
    """The sides of one configuration's comparison."""

    subject: Subject
    handle: Any
    method: str
    keep: Keep

    def run(self, repeats: int, warmup: int, new_tokens: int) -> dict[str, Any]:
        """Everything that is reported of this configuration."""
        before, after = self._probe(NONE), self._probe(self.method)
        samples = interleave(self._sides(after), repeats, warmup)
        decode = self._decode(new_tokens, repeats, warmup)
        reported = self.subject.clock.kind == "wall"
        return {
            "method": self.method,
            "keep": self.keep,
            **timings(samples, reported=reported),
            **against_floor(samples),
            **against_ideal(samples),
            "evidence": evidence(samples),
            **decode["method"],
            **after.facts,
            "baseline": {
                **timings(samples, "baseline", reported),
                **decode["baseline"],
                **before.facts,
            },
        }

    def _probe(self, method: str) -> _Probe:
        """One untimed prefill that tells shapes, cache and memory."""
        subject, inputs = self.subject, self.subject.inputs()
        with under(self.handle, method, self.keep), torch.no_grad():
            _, trace, output = timed_call(
                lambda: subject.prefill(inputs), subject.parts, subject.clock, True
            )
            last = None if method == NONE else self.handle.last
            peak = subject.clock.peak_memory(lambda: subject.prefill(inputs))
        length = trace.embeddings.shape[1]
        shown = _image_tokens(subject.model, inputs)
        facts = {
            "tokens": shown if last is None else sum(len(kept) for kept in last.kept),
            "prompt_tokens": length,
            "kv_bytes": cache_bytes(output.past_key_values),
            "peak_memory_bytes": peak,
            "flops": self._flops(inputs, trace, last),
            "tokens_in_layers": _tokens_in_layers(subject.parts, last, shown),
        }
        lengths = [] if last is None else [attention for attention, _ in last.layer_lengths]
        if not lengths and has_layers(subject.parts):
            lengths = [length] * _depth(subject.parts)
        return _Probe(facts, trace.embeddings, lengths)

    def _flops(self, inputs: Mapping[str, Any], trace: Trace, last: Any) -> dict[str, int] | None:
        found = flops.of_call(
            self.subject.model.config,
            inputs,
            trace.connector_tokens,
            trace.embeddings.shape[1],
            last,
        )
        return None if found is None else found.to_dict()

    def _sides(self, probe: _Probe) -> dict[str, Side]:
        short = probe.embeddings
        sides: dict[str, Side] = {
            "baseline": lambda: self._as(NONE),
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

    def _as(self, method: str) -> Sample:
        subject = self.subject
        inputs, processor = subject.processed()
        with under(self.handle, method, self.keep):
            sample, _, _ = timed_call(lambda: subject.prefill(inputs), subject.parts, subject.clock)
            reported = {} if method == NONE else self.handle.last.times
        return {
            **sample,
            **({} if processor is None else {"processor": processor}),
            **{f"reported_{stage}": seconds for stage, seconds in reported.items()},
        }

    def _tower_alone(self) -> Sample:
        inputs = self.subject.inputs()
        with off(self.handle):
            return {"seconds": tower_alone(self.subject.model, inputs, self.subject.clock)}

    def _prefill_alone(self, embeddings: Tensor) -> Sample:
        with off(self.handle):
            return {"seconds": prefill_alone(self.subject.parts, embeddings, self.subject.clock)}

    def _layers_alone(self, embeddings: Tensor, lengths: Sequence[int]) -> Sample:
        with off(self.handle):
            seconds = layers_alone(self.subject.parts, embeddings, lengths, self.subject.clock)
        return {"seconds": seconds}

    def _decode(self, new_tokens: int, repeats: int, warmup: int) -> dict[str, dict[str, Any]]:
        """Times of generations of both sides: `tpot` (median) and all others as `decode`."""
        if new_tokens < 2:
            return {side: {"tpot": None, "decode": None} for side in ("baseline", "method")}
        sides = {
            "baseline": lambda: self._generate(NONE, new_tokens),
            "method": lambda: self._generate(self.method, new_tokens),
        }
        runs = interleave(sides, repeats, min(1, warmup))
        found = {name: decoding.summarize(rows, new_tokens) for name, rows in runs.items()}
        return {name: {"tpot": row["tpot"]["median"], "decode": row} for name, row in found.items()}

    def _generate(self, method: str, new_tokens: int) -> Generation:
        subject = self.subject
        inputs, processor = subject.processed()
        with under(self.handle, method, self.keep):
            return decoding.generate_once(
                subject.model, inputs, subject.parts, subject.clock, new_tokens, processor
            )


def _image_tokens(model: Any, inputs: Mapping[str, Any]) -> int:
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


def _tokens_in_layers(parts: Parts, last: Any, shown: int) -> list[int]:
    """Visual tokens in the attention of each layer of the language model."""
    if last is not None and last.layer_tokens:
        return [sum(counts) for counts in last.layer_tokens]
    return [shown if last is None else sum(last.tokens_after)] * _depth(parts)


def _depth(parts: Parts) -> int:
    config: Any = parts.language_model.config
    return int(config.num_hidden_layers)


@dataclass(frozen=True)
class _Probe:
    facts: dict[str, Any]
    embeddings: Tensor
    lengths: Sequence[int]
