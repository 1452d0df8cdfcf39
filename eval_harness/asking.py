"""Asks a model questions about images under many configurations, and notes which it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from eval_harness.controls import ORACLES, oracle
from eval_harness.replay import NoRecording, Recording, built, record, union
from eval_harness.stages import parts
from vlmcompress.core.errors import ConfigError, VLMCompressError
from vlmcompress.methods import registry
from vlmcompress.methods.base import Method

FULL, BLIND = "full", "blind"
_SEED_STEP = 1_000_003  # apart by more than there are batches


class Sample(Protocol):
    """A question about an image; see `vlmcompress.reference.Sample`."""

    image: Any
    scene_id: int
    kind: str
    question: str
    answer: str
    object_coverage: np.ndarray
    asked_coverage: np.ndarray


class Cell(NamedTuple):
    """One configuration. The full model and the blind one have no positions.

    Without `keep` the method's own budget decides.
    """

    positions: str
    method: str
    keep: float | int | None


FULL_CELL, BLIND_CELL = Cell("", FULL, 1.0), Cell("", BLIND, 0)


@dataclass(frozen=True)
class Entry:
    """What is run under a name.

    Attributes:
        method: a configured method, a spec string, or None for a control by coverage.
        stochastic: whether what it keeps depends on the seed.
        training_free: whether it leaves everything as it is where all is kept.
    """

    method: Method | str | None
    stochastic: bool = False
    training_free: bool = True

    @classmethod
    def of(cls, method: str | Method) -> Entry:
        """Of a registered name, a configured method, a spec string or the name of a control.

        Raises:
            UnknownMethodError: for an unknown name.
        """
        if method in ORACLES:
            return cls(None)
        if isinstance(method, str) and method.isidentifier():
            method = registry.create(method)
        stages = built(method).templates
        return cls(method, any(m.stochastic for m in stages), all(m.training_free for m in stages))


@dataclass(frozen=True)
class Asking:
    """The configurations that are asked.

    Attributes:
        entries: {name: what is run under it}.
        keeps: fractions or counts; None for methods with budgets of their own.
        positions: modes, as `patch` takes them. The same selection is asked in all of them.
        seeds: runs of what depends on a seed.
        controls: whether the full model and the one without image are asked too.
        tolerant: whether a configuration that the library refuses is noted instead of raised.
    """

    entries: dict[str, Entry]
    keeps: tuple[float | int | None, ...]
    positions: tuple[str, ...] = ("auto",)
    seeds: int = 1
    controls: bool = True
    tolerant: bool = False

    @classmethod
    def of(
        cls, methods: Sequence[str | Method], keeps: Sequence[float | int | None], **options: Any
    ) -> Asking:
        """Of methods as users name them; `blind` is left out, as it is a control.

        Raises:
            ConfigError: for two methods of one name, or `seeds` below 1.
            UnknownMethodError: for an unknown name.
        """
        entries: dict[str, Entry] = {}
        for method in methods:
            name = method if isinstance(method, str) else method.name
            if name == BLIND:
                continue
            if name in entries or name == FULL:
                raise ConfigError(f"Method {name!r} is given twice, or is a reserved name.")
            entries[name] = Entry.of(method)
        made = cls(entries, tuple(keeps), **options)
        if made.seeds < 1:
            raise ConfigError(f"seeds is {made.seeds!r}; it must be 1 or more.")
        return made

    def seeds_of(self, name: str) -> range:
        """How often a method is run."""
        return range(self.seeds if self.entries[name].stochastic else 1)

    def runs(self) -> list[tuple[str, float | int | None]]:
        """(method, keep) pairs that differ from the full model."""
        return [(m, k) for k in self.keeps for m in self.entries if not self.is_full(m, k)]

    def is_full(self, name: str, keep: float | int | None) -> bool:
        """Whether a method leaves everything as it is."""
        return isinstance(keep, float) and keep >= 1 and self.entries[name].training_free


@dataclass(frozen=True)
class Answers:
    """Which questions were answered rightly.

    Attributes:
        right: {configuration: [runs, questions] bool}, several runs where a seed matters.
        refused: {configuration: why the library refused it}.
    """

    right: dict[Cell, np.ndarray]
    refused: dict[Cell, str]


def ask(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    plan: Asking,
    *,
    batch_size: int = 64,
    seed: int = 0,
    new_tokens: int = 4,
    reuse_tower: bool = True,
    clip: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Answers:
    """Ask every question under every configuration; `evaluate` explains the arguments.

    Raises:
        ConfigError: without samples.
        VLMCompressError: for a configuration that the library refuses, unless the plan is tolerant.
    """
    from vlmcompress import patch

    asked = list(samples)
    if not asked:
        raise ConfigError("An evaluation needs at least one sample.")
    run = _Run(model, processor, plan, seed, new_tokens, reuse_tower)
    with patch(model, "uniform", keep=1, processor=processor, clip=clip) as handle:
        for index, start in enumerate(range(0, len(asked), batch_size)):
            run.batch(handle, index, asked[start : start + batch_size])
            if progress:
                progress(f"{min(start + batch_size, len(asked))} of {len(asked)} questions")
    right = {cell: np.array(list(rows.values())) for cell, rows in run.right.items()}
    return Answers(right, run.refused)


@dataclass
class _Run:
    """Asks batches and collects which answers were right, by configuration and run."""

    model: Any
    processor: Any
    plan: Asking
    seed: int
    new_tokens: int
    reuse_tower: bool
    right: dict[Cell, dict[int, list[bool]]] = field(default_factory=dict)
    refused: dict[Cell, str] = field(default_factory=dict)

    def batch(self, handle: Any, index: int, samples: Sequence[Sample]) -> None:
        """Ask one batch under every configuration."""
        inputs = self._inputs(samples, with_image=True)
        recording = self._record(handle, inputs, samples)
        if self.plan.controls:
            with handle.disabled():
                blind = self._ask(self._inputs(samples, with_image=False))
                self._note(BLIND_CELL, blind, samples)
                with recording.replayed():
                    self._note(FULL_CELL, self._ask(inputs), samples)
        for name, keep in self.plan.runs():
            for run in self.plan.seeds_of(name):
                seed = self.seed + index + run * _SEED_STEP
                self._configuration(handle, recording, inputs, samples, (name, keep, run, seed))

    def _configuration(
        self,
        handle: Any,
        recording: Recording | NoRecording,
        inputs: Any,
        samples: Sequence[Sample],
        which: tuple[str, float | int | None, int, int],
    ) -> None:
        """Ask a batch under one configuration in every position mode."""
        name, keep, run, seed = which
        method = self.plan.entries[name].method or oracle(name, samples)
        shown = recording.method(method)
        seen: Any = None
        for mode in self.plan.positions:
            cell = Cell(mode, name, keep)
            if cell in self.refused:
                continue
            try:
                handle.set(method=shown, keep=keep, seed=seed, positions=mode)
                with recording.replayed(method):
                    seen = recording.seen(handle, inputs, method) if seen is None else seen
                    answers = self._ask(seen)
            except VLMCompressError as error:
                if not self.plan.tolerant:
                    raise
                self.refused[cell] = str(error)
                self.right.pop(cell, None)
                continue
            self._note(cell, answers, samples, run)

    def _inputs(self, samples: Sequence[Sample], with_image: bool) -> Any:
        texts = [prompt_of(self.processor, s.question, int(with_image)) for s in samples]
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
        methods = [entry.method for entry in self.plan.entries.values()]
        needs = union([method for method in methods if isinstance(method, Method)])
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
        self, cell: Cell, answers: list[str], samples: Sequence[Sample], run: int = 0
    ) -> None:
        right = [is_right(a, s.answer) for a, s in zip(answers, samples, strict=True)]
        self.right.setdefault(cell, {}).setdefault(run, []).extend(right)


def tokens_left(
    model: Any,
    processor: Any,
    method: str | Method,
    keep: float | int | None,
    samples: Sequence[Sample],
    clip: Any = None,
) -> float:
    """Mean over questions of the visual tokens that the language model is given for an image.

    Args:
        model: unpatched; so it is afterwards.
        processor: with a chat template.
        method: as `patch` takes it.
        keep: budget.
        samples: questions with one image each.
        clip: as `patch` takes it.
    """
    from vlmcompress import patch

    inputs = processor(
        text=[prompt_of(processor, sample.question, 1) for sample in samples],
        images=[sample.image for sample in samples],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    with patch(model, method, keep=keep, processor=processor, clip=clip) as handle, torch.no_grad():
        model(**inputs.to(model.device, model.dtype), logits_to_keep=1)
        record = handle.last
        assert record is not None  # the call has just been made
        return float(np.mean(record.tokens_after))


def is_right(answer: str, expected: str) -> bool:
    """Whether two answers are equal, case and surrounding space aside."""
    return answer.strip().lower() == expected.strip().lower()


def prompt_of(processor: Any, question: str, images: int) -> str:
    """The chat prompt that asks a question about that many images, which come first."""
    content = [{"type": "image"}] * images
    content.append({"type": "text", "text": question})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
