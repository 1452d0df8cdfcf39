"""Accuracy of a compressed model on questions about images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import nn

from eval_harness import machine, statistics
from eval_harness.controls import ORACLES, oracle
from eval_harness.replay import NoRecording, Recording, record, union
from eval_harness.stages import parts
from vlmcompress.core.errors import ConfigError
from vlmcompress.methods import registry
from vlmcompress.methods.base import Method

_FULL, _BLIND = "full", "blind"
_SEED_STEP = 1_000_003  # apart by more than there are batches

_Answers: TypeAlias = dict[tuple[str, float | int], dict[int, list[bool]]]
"""Which answers were right, by configuration and run (several where a seed matters)."""


class Sample(Protocol):
    """A question about an image; see `vlmcompress.reference.Sample`."""

    image: Any
    scene_id: int
    kind: str
    question: str
    answer: str
    object_coverage: np.ndarray
    asked_coverage: np.ndarray


def evaluate(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    *,
    methods: Sequence[str | Method],
    keeps: Sequence[float | int],
    positions: str = "auto",
    batch_size: int = 64,
    seed: int = 0,
    seeds: int = 1,
    new_tokens: int = 4,
    reuse_tower: bool = True,
    clip: Any = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Ask every question under every method and budget.

    The greedy answer must equal the expected one (case and surrounding space aside). Accuracies are
    unweighted means over the kinds of questions, their intervals bootstraps over images.

    Args:
        model: an unpatched VLM; unpatched again afterwards.
        processor: with a chat template.
        samples: questions; those of one image (`scene_id`) should follow each other.
        methods: registered names, configured methods, or the controls `oracle` (patches that
            objects cover), `oracle_asked` (the asked objects) and `anti_oracle`. The control
            `blind` (no image) and the full model are always run.
        keeps: fractions or counts. At 1.0 a training-free method is the full model, which runs
            once.
        positions: as `patch` takes it.
        batch_size: questions at a time.
        seed: of random methods (another number for each batch) and of the bootstrap.
        seeds: how often to run the methods that depend on a seed; a question then counts with the
            share of runs that answered it rightly.
        new_tokens: longest answer.
        reuse_tower: run the tower once per image instead of once per question and configuration.
        clip: as `patch` takes it, for methods that read the question.
        progress: called with a line of text after each batch.

    Returns:
        JSON-ready: `n`, `images`, `accuracy` {keep: {method: {mean, low, high}}}, `difference` (the
        same for method minus full model, paired), `by_kind` (full model) and `by_kind_interval`,
        `by_kind_at` {keep: {method: {kind: float}}}, `by_seed` {keep: {method: [float, ...]}} of
        the methods that depend on a seed, `full` {mean, low, high}, `blind`,
        `blind_by_kind` and `blind_interval`, `seed`, `positions`, `commit`, `machine`.

    Raises:
        ConfigError: without samples, for an unknown method or two methods of one name, or for
            `seeds` below 1.
    """
    asked = list(samples)
    plan = _Plan.of(methods, keeps, seeds)
    if not asked:
        raise ConfigError("evaluate needs at least one sample.")
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds!r}; it must be 1 or more.")
    from vlmcompress import patch

    where = machine.describe(model)
    run = _Run(model, processor, plan, seed, new_tokens, reuse_tower)
    more = {"positions": positions, "processor": processor, "clip": clip}
    with patch(model, "uniform", keep=1, **more) as handle:
        for index, batch in enumerate(_batches(asked, batch_size)):
            run.batch(handle, index, batch)
            if progress:
                progress(f"{run.done} of {len(asked)} questions")
    return {
        **_results(asked, plan, run.right, seed),
        "seed": seed,
        "positions": positions,
        "commit": where["commit"],
        "machine": where,
    }


@dataclass(frozen=True)
class _Plan:
    """The configurations: registered or configured methods and controls, and the budgets."""

    methods: dict[str, Method | None]
    keeps: tuple[float | int, ...]
    seeds: int

    @classmethod
    def of(cls, methods: Sequence[str | Method], keeps: Sequence[float | int], seeds: int) -> _Plan:
        found: dict[str, Method | None] = {}
        for method in methods:
            name = method if isinstance(method, str) else method.name
            if name == _BLIND:
                continue
            if name in found or name == _FULL:
                raise ConfigError(f"Method {name!r} is given twice, or is a reserved name.")
            found[name] = _instance(method)
        return cls(found, tuple(keeps), seeds)

    def seeds_of(self, name: str) -> range:
        """How often a method is run."""
        method = self.methods[name]
        return range(self.seeds if method is not None and method.stochastic else 1)

    def runs(self) -> list[tuple[str, float | int]]:
        """(method, keep) pairs that differ from the full model."""
        return [(m, k) for k in self.keeps for m in self.methods if not self.is_full(m, k)]

    def is_full(self, name: str, keep: float | int) -> bool:
        """Whether a method leaves everything as it is."""
        method = self.methods[name]
        return isinstance(keep, float) and keep >= 1 and (method is None or method.training_free)


def _instance(method: str | Method) -> Method | None:
    """The configured method; None for a control by coverage."""
    if isinstance(method, Method):
        return method
    return None if method in ORACLES else registry.create(method)


@dataclass
class _Run:
    """Asks batches and collects which answers were right, by configuration."""

    model: Any
    processor: Any
    plan: _Plan
    seed: int
    new_tokens: int
    reuse_tower: bool
    right: _Answers = field(default_factory=dict)
    done: int = 0

    def batch(self, handle: Any, index: int, samples: Sequence[Sample]) -> None:
        """Ask one batch under every configuration."""
        inputs = self._inputs(samples, with_image=True)
        recording = self._record(handle, inputs, samples)
        with handle.disabled():
            self._note((_BLIND, 0), self._ask(self._inputs(samples, with_image=False)), samples)
            with recording.replayed():
                self._note((_FULL, 1.0), self._ask(inputs), samples)
        for name, keep in self.plan.runs():
            method = self.plan.methods[name] or oracle(name, samples)
            for run in self.plan.seeds_of(name):
                seed = self.seed + index + run * _SEED_STEP
                handle.set(method=recording.method(method), keep=keep, seed=seed)
                with recording.replayed(method):
                    self._note((name, keep), self._ask(inputs), samples, run)
        self.done += len(samples)

    def _inputs(self, samples: Sequence[Sample], with_image: bool) -> Any:
        texts = [_prompt(self.processor, s.question, with_image) for s in samples]
        images = {"images": [s.image for s in samples]} if with_image else {}
        inputs = self.processor(
            text=texts, **images, padding=True, padding_side="left", return_tensors="pt"
        )
        return inputs.to(self.model.device, self.model.dtype)

    def _record(
        self, handle: Any, inputs: Any, samples: Sequence[Sample]
    ) -> Recording | NoRecording:
        if not self.reuse_tower:
            return NoRecording()
        order = {scene: i for i, scene in enumerate(dict.fromkeys(s.scene_id for s in samples))}
        images = torch.tensor([order[s.scene_id] for s in samples])
        needs = union([m for m in self.plan.methods.values() if m is not None])
        return record(self.model, parts(self.model).tower, handle, inputs, images, needs)

    def _ask(self, inputs: Any) -> list[str]:
        """Greedy answers, one per row."""
        tokenizer = self.processor.tokenizer
        with torch.no_grad():
            ids = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=self.new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True)

    def _note(
        self,
        key: tuple[str, float | int],
        answers: list[str],
        samples: Sequence[Sample],
        run: int = 0,
    ) -> None:
        right = [is_right(a, s.answer) for a, s in zip(answers, samples, strict=True)]
        self.right.setdefault(key, {}).setdefault(run, []).extend(right)


def is_right(answer: str, expected: str) -> bool:
    """Whether two answers are equal, case and surrounding space aside."""
    return answer.strip().lower() == expected.strip().lower()


def _prompt(processor: Any, question: str, with_image: bool) -> str:
    content = [{"type": "image"}] if with_image else []
    content.append({"type": "text", "text": question})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def _batches(samples: Sequence[Sample], size: int) -> Iterable[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _results(
    samples: Sequence[Sample],
    plan: _Plan,
    right: _Answers,
    seed: int,
) -> dict[str, Any]:
    kinds = np.array([s.kind for s in samples])
    images = np.array([s.scene_id for s in samples])
    runs = {key: np.array(list(rows.values()), dtype=float) for key, rows in right.items()}
    values = {key: rows.mean(axis=0) for key, rows in runs.items()}
    full = values[_FULL, 1.0]

    def of(name: str, keep: float | int) -> np.ndarray:
        return full if plan.is_full(name, keep) else values[name, keep]

    def table(cell: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        return {
            str(keep): {name: cell(of(name, keep)) for name in plan.methods} for keep in plan.keeps
        }

    def estimate(row: np.ndarray) -> dict[str, float]:
        return statistics.mean_over_kinds(row, kinds, images, seed=seed).to_dict()

    return {
        "n": len(samples),
        "images": len(np.unique(images)),
        "accuracy": table(estimate),
        "difference": table(lambda row: estimate(row - full)),
        "by_kind": _by_kind(full, kinds),
        "by_kind_interval": {
            str(kind): statistics.proportion(int(rows.sum()), len(rows)).to_dict()
            for kind in np.unique(kinds)
            for rows in [full[kinds == kind]]
        },
        "by_kind_at": table(lambda row: _by_kind(row, kinds)),
        "by_seed": {
            str(keep): {
                name: [_mean(row, kinds) for row in runs[name, keep]]
                for name in plan.methods
                if len(runs.get((name, keep), ())) > 1
            }
            for keep in plan.keeps
        },
        "full": estimate(full),
        "blind": estimate(values[_BLIND, 0])["mean"],
        "blind_by_kind": _by_kind(values[_BLIND, 0], kinds),
        "blind_interval": estimate(values[_BLIND, 0]),
    }


def _mean(values: np.ndarray, kinds: np.ndarray) -> float:
    return float(np.mean(list(_by_kind(values, kinds).values())))


def _by_kind(values: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    return {str(kind): float(values[kinds == kind].mean()) for kind in np.unique(kinds)}
