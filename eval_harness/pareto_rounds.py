"""Rounds of timings and of questions that the Pareto front is made of; see `eval_harness.pareto`.

One round is one part of a resumable measurement, so that a stopped one loses a round at most and
more rounds can be added later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from eval_harness import asking, machine
from eval_harness.asking import BLIND_CELL, FULL_CELL, Asking
from eval_harness.clock import Clock, ClockKind
from eval_harness.floor import prefill_alone, tower_alone
from eval_harness.shapes import build, example_inputs
from eval_harness.stages import parts, timed_call
from vlmcompress.core.costs import tower_flops
from vlmcompress.methods import pipeline

#: A stage that looks at nothing and drops nothing: the tower runs as under any method.
NOTHING = "uniform:1.0"
_NEW_TOKENS = 6  # the longest answer, a word, and its end
_BATCH = 64


@dataclass(frozen=True)
class Timing:
    """On what times are taken.

    Attributes:
        shape: one of `eval_harness.shapes.names()`.
        dtype: of the weights, by its name.
        device: of the model.
        clock: `wall`, or `cpu` for processor time.
        text_tokens: length of the prompt besides the image.
    """

    shape: str = "llava-1.5-1b"
    dtype: str = "bfloat16"
    device: str = "cpu"
    clock: ClockKind = "wall"
    text_tokens: int = 64

    def identity(self) -> dict[str, Any]:
        """JSON-ready: what a time depends on, the machine included."""
        where = machine.environment()
        return {**asdict(self), **{k: where[k] for k in ("cpu", "threads", "torch")}}


def time_round(timing: Timing, configs: Sequence[tuple[str, int]], turn: int) -> dict[str, Any]:
    """Time every configuration once, and the unpatched model and the floors beside them.

    Args:
        timing: on what.
        configs: (spec, tokens) pairs; `tokens` is the budget of the stage that has none.
        turn: number of the round; every second one runs in reverse order.

    Returns:
        Seconds: `unpatched`, `tower` (alone), `prefill` {tokens: alone, of the prompt that the
        first configuration of that budget leaves} and `ttft` [one per configuration]; likewise
        `tokens` and `patches` (after each tower layer); `machine`.
    """
    subject = _subject(timing)
    sides: dict[str, Callable[[], Any]] = {
        "unpatched": subject.unpatched,
        "tower": subject.tower,
        **{f"prefill {keep}": subject.prefill(keep) for _, keep in configs},
        **{f"{i}": subject.compressed(*config) for i, config in enumerate(configs)},
    }
    with subject.patched():
        subject.warm_up(configs)
        found = {name: sides[name]() for name in list(sides)[:: 1 if turn % 2 == 0 else -1]}
    rows = [found[f"{i}"] for i in range(len(configs))]
    return {
        "unpatched": found["unpatched"],
        "tower": found["tower"],
        "prefill": {str(keep): found[f"prefill {keep}"] for _, keep in configs},
        "ttft": [row["ttft"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "patches": [row["patches"] for row in rows],
        "machine": machine.describe(subject.model),
    }


def tower_round(timing: Timing, specs: Sequence[str], turn: int) -> dict[str, Any]:
    """Time the tower under methods inside it, and under none.

    Args:
        timing: on what.
        specs: one stage inside the tower each.
        turn: number of the round; every second one runs in reverse order.

    Returns:
        `seconds` {spec: of the tower}, where `NOTHING` stands for no method (layers that nobody
        reads are skipped there too), `patches` {spec: after each layer} and `flops` {spec: of the
        blocks, by formula, as a share of those of all patches}.
    """
    subject = _subject(timing)
    names = [NOTHING, *specs]
    with subject.patched():
        subject.tower_under(NOTHING)  # a round's first call may pay for what the last one left
        rows = {name: subject.tower_under(name) for name in names[:: 1 if turn % 2 == 0 else -1]}
    return {
        "seconds": {name: rows[name]["seconds"] for name in names},
        "patches": {name: rows[name]["patches"] for name in specs},
        "flops": {name: subject.flops(name, rows[name]["patches"]) for name in specs},
        "machine": machine.describe(subject.model),
    }


def ask_round(
    world: str, n: int, split: str, weights: Path, specs: Sequence[str], keep: int | None
) -> dict[str, Any]:
    """Ask the reference model all questions of a world under some pipelines.

    Args:
        world: which.
        n: questions, all kinds alike.
        split: where they come from.
        weights: folder of the model.
        specs: pipelines; none asks the full model and the blind one instead.
        keep: tokens per image for the stage that has no budget.

    Returns:
        `right` {spec, `full` or `blind`: a string of 0 and 1}, `kinds` and `scenes` of the
        questions.
    """
    torch.set_num_threads(1)
    model, processor, samples = _questions(world, n, split, weights)
    plan = Asking.of(specs, (keep or 1,), positions=("contiguous",), controls=not specs)
    answers = asking.ask(
        model, processor, samples, plan, batch_size=_BATCH, new_tokens=_NEW_TOKENS
    ).right
    names = {FULL_CELL: "full", BLIND_CELL: "blind"}
    return {
        "right": {
            names.get(cell, cell.method): "".join("01"[int(bit)] for bit in rows[0])
            for cell, rows in answers.items()
        },
        "kinds": [sample.kind for sample in samples],
        "scenes": [int(sample.scene_id) for sample in samples],
    }


class _Subject:
    """A model of a known shape, with its inputs, and calls of it that are timed."""

    def __init__(self, timing: Timing) -> None:
        self.model: Any = build(timing.shape, getattr(torch, timing.dtype), timing.device)
        self.inputs = example_inputs(self.model, text_tokens=timing.text_tokens)
        self.clock, self.parts = Clock(self.model.device, timing.clock), parts(self.model)
        self.embeddings: dict[int, torch.Tensor] = {}
        self.handle: Any = None

    @contextmanager
    def patched(self) -> Iterator[None]:
        """With a handle, in the body of the `with`."""
        from vlmcompress import patch

        with patch(self.model, NOTHING) as self.handle:
            yield

    def warm_up(self, configs: Sequence[tuple[str, int]]) -> None:
        """Run the first configuration of each budget once, untimed, and keep its prompt."""
        for spec, keep in configs:
            if keep in self.embeddings:
                continue
            self.handle.set(method=spec, keep=keep)
            _, trace, _ = timed_call(self._ttft, self.parts, self.clock, keep_embeddings=True)
            self.embeddings[keep] = trace.embeddings

    def _ttft(self) -> Any:
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    def unpatched(self) -> float:
        """Seconds to the first token."""
        with self.handle.disabled():
            return timed_call(self._ttft, self.parts, self.clock)[0]["ttft"]

    def tower(self) -> float:
        """Seconds of the tower alone."""
        with self.handle.disabled():
            return tower_alone(self.model, self.inputs, self.clock)

    def prefill(self, keep: int) -> Callable[[], float]:
        """A call that returns the seconds of the language model alone."""

        def call() -> float:
            with self.handle.disabled():
                return prefill_alone(self.parts, self.embeddings[keep], self.clock)

        return call

    def compressed(self, spec: str, keep: int) -> Callable[[], dict[str, Any]]:
        """A call that returns the seconds to the first token, the tokens and tower patches."""

        def call() -> dict[str, Any]:
            self.handle.set(method=spec, keep=keep)
            seconds = timed_call(self._ttft, self.parts, self.clock)[0]["ttft"]
            last = self.handle.last
            return {
                "ttft": seconds,
                "tokens": sum(last.tokens_after),
                "patches": list(last.tower_patches),
            }

        return call

    def tower_under(self, spec: str) -> dict[str, Any]:
        """Seconds of the tower under a method, and patches after each of its layers."""
        self.handle.set(method=spec)
        stages, _, encoding = timed_call(
            lambda: self.handle.encode(**self.inputs), self.parts, self.clock
        )
        return {"seconds": stages["tower"], "patches": list(encoding.encoded.tower_patches)}

    def flops(self, spec: str, patches: Sequence[int]) -> float:
        """FLOPs of the tower's blocks under a method, over those of all patches."""
        config = self.model.config.vision_config
        (method,) = pipeline.build(spec).templates
        n, d = (config.image_size // config.patch_size) ** 2, config.hidden_size
        before, after = [n, *patches][:-1], list(patches)
        place = method.place  # type: ignore[attr-defined]  # a method inside the tower
        attention = after if place == "before" else before
        mlp = before if place == "after" else after
        costs = (4 * d * d, 2 * d * config.intermediate_size, d)
        rows = [(a + 1, m + 1) for a, m in zip(attention, mlp, strict=True)]
        return tower_flops(rows, *costs) / tower_flops([(n + 1, n + 1)] * len(rows), *costs)


@lru_cache(maxsize=1)
def _subject(timing: Timing) -> _Subject:
    return _Subject(timing)


@lru_cache(maxsize=2)
def _questions(world: str, n: int, split: str, weights: Path) -> tuple[Any, Any, list[Any]]:
    """Model, processor and questions: the same for all parts of a process."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from vlmcompress.reference.data import samples

    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(weights)
    return model, processor, list(samples(split, n, world=world))
