"""Asks a model a batch of questions under one setting after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from eval_harness.asking import FULL, Entry, prompt_of
from eval_harness.replay import NoRecording, Recording, record, union
from eval_harness.shelf import Shelved
from eval_harness.stages import parts
from eval_harness.sweep.adapted import switchable
from eval_harness.sweep.settings import Setting
from vlmcompress.core.errors import UnsupportedModelError, VLMCompressError
from vlmcompress.methods.base import Method


class Plan(Protocol):
    """What an asker must know of a `SweepPlan`."""

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Methods with what they keep."""

    @property
    def positions(self) -> str:
        """As `patch` takes it."""

    @property
    def reuse_tower(self) -> bool:
        """Whether the tower may run once for several settings."""

    @property
    def adapter(self) -> Shelved | None:
        """Whose settings are among them."""


@dataclass(frozen=True)
class Asked:
    """A question that is ready for the processor.

    Attributes:
        prompt: what the user says.
        images: that it is about.
        keys: of the pictures; equal keys, equal pictures.
    """

    prompt: str
    images: tuple[Image, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it read.

    Attributes:
        text: the answer.
        tokens_in: of the prompt, as the language model saw it, without padding.
        tokens_out: generated, the end included.
        visual_in: visual tokens of the uncompressed prompt.
        visual_kept: those that entered the language model.
        visual_layers: those in each of its layers; empty where all layers see the same.
    """

    text: str
    tokens_in: int
    tokens_out: int
    visual_in: int
    visual_kept: int
    visual_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Questions that are asked together.

    Attributes:
        samples: the questions.
        inputs: of the model.
        recording: what the tower made of the pictures, to be used again.
    """

    samples: Sequence[Asked]
    inputs: Any
    recording: Recording | NoRecording


class Unusable(VLMCompressError, ValueError):
    """The processor refuses samples of a batch: {place: why}."""

    def __init__(self, why: dict[int, str]) -> None:
        """With the places of the samples."""
        self.why = why
        super().__init__("; ".join(f"sample {i} of the batch: {text}" for i, text in why.items()))


@dataclass
class Spent:
    """Seconds by what they went to: `processor` and `model`."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Add the time of the body."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Asker:
    """A patched model with its processor; a context manager that takes the patch off.

    Attributes:
        spent: where the time went.
    """

    def __init__(self, model: Any, processor: Any, plan: Plan, clip: Any = None) -> None:
        """Nothing is patched before the `with`.

        Args:
            model: an unpatched VLM.
            processor: its processor.
            plan: what is asked.
            clip: as `patch` takes it.
        """
        self.model, self.processor, self.plan, self.clip = model, processor, plan, clip
        self.spent = Spent()
        self._entries = {s: Entry.of(s.method) for s in plan.settings if s.compresses}
        self._exits = ExitStack()
        self._handle: Any = None
        self._lora: Callable[[], AbstractContextManager[None]] = nullcontext

    def __enter__(self) -> Asker:
        from vlmcompress import patch

        options = {"processor": self.processor, "clip": self.clip, "positions": self.plan.positions}
        with ExitStack() as made:
            adapter = self.plan.adapter
            if adapter is not None and adapter.found.lora:
                self._lora = made.enter_context(switchable(self.model, adapter.folder))
            self._handle = made.enter_context(patch(self.model, "uniform", keep=1, **options))
            for setting in self.plan.settings:
                if setting.adapter and setting.compresses:  # it fits the model, or nothing is asked
                    self._handle.set(method=setting.method, keep=setting.keep)
            self._exits = made.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._exits.close()

    def batch(self, samples: Sequence[Asked], settings: Sequence[Setting]) -> Batch:
        """Prepare questions.

        Args:
            samples: the questions.
            settings: under which they are going to be asked.

        Raises:
            Unusable: where the processor refuses some of them.
        """
        with self.spent.on("processor"):
            try:
                inputs = self._inputs(samples)
            except Exception:  # whatever a processor raises for a picture that it cannot take
                why = self._refused(samples)
                if not why:
                    raise
                raise Unusable(why) from None
        return Batch(samples, inputs, self._recorded(samples, inputs, settings))

    def answers(self, batch: Batch, setting: Setting, new_tokens: int, seed: int) -> list[Answer]:
        """Greedy answers, one per question.

        Args:
            batch: the questions.
            setting: the method and what it keeps.
            new_tokens: longest answer.
            seed: of methods that draw numbers.

        Raises:
            VLMCompressError: where the library refuses the setting for this model or these inputs.
        """
        with self.spent.on("model"), self._lora() if setting.adapter else nullcontext():
            if not setting.compresses:
                inputs = batch.inputs if setting.method == FULL else self._blind(batch.samples)
                with self._handle.disabled(), batch.recording.replayed():
                    return self._answers(inputs, batch.samples, new_tokens, None)
            method = self._entries[setting].method
            plain = isinstance(method, Method) and method.training_free
            # Specs and methods that learnt something run the tower itself.
            recording = batch.recording if plain else NoRecording()
            self._handle.set(method=recording.method(method), keep=setting.keep, seed=seed)
            with recording.replayed(method):
                seen = recording.seen(self._handle, batch.inputs, method)
                return self._answers(seen, batch.samples, new_tokens, self._handle)

    def _inputs(self, samples: Sequence[Asked], images: bool = True) -> Any:
        shown = {"images": [list(s.images) for s in samples]} if images else {}
        texts = [self._text(s.prompt, len(s.images) if images else 0) for s in samples]
        inputs = self.processor(
            text=texts, **shown, padding=True, padding_side="left", return_tensors="pt"
        )
        return inputs.to(self.model.device, self.model.dtype)

    def _text(self, prompt: str, images: int) -> str:
        templated = getattr(self.processor, "chat_template", None)
        return prompt_of(self.processor, prompt, images) if templated else prompt

    def _refused(self, samples: Sequence[Asked]) -> dict[int, str]:
        """Which samples the processor refuses alone, and why."""
        why = {}
        for place, sample in enumerate(samples):
            try:
                self._inputs([sample])
            except Exception as error:
                why[place] = f"the processor refuses it: {error}"
        return why

    def _blind(self, samples: Sequence[Asked]) -> Any:
        return self._inputs(samples, images=False)

    def _recorded(
        self, samples: Sequence[Asked], inputs: Any, settings: Sequence[Setting]
    ) -> Recording | NoRecording:
        """The tower's output, where more than one setting can use it."""
        methods = [self._entries[s].method for s in settings if s.compresses]
        plain = [m for m in methods if isinstance(m, Method) and m.training_free]
        alone = any(len(sample.keys) != 1 for sample in samples)
        if not self.plan.reuse_tower or alone or len(plain) < 2:
            return NoRecording()
        keys = [sample.keys[0] for sample in samples]
        order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        images = torch.tensor([order[key] for key in keys])
        with self.spent.on("model"):
            try:
                tower = parts(self.model).tower
                return record(self.model, tower, self._handle, inputs, images, union(plain))
            except (UnsupportedModelError, VLMCompressError):
                return NoRecording()

    def _answers(
        self, inputs: Any, samples: Sequence[Asked], new_tokens: int, handle: Any
    ) -> list[Answer]:
        before = handle.last if handle else None
        tokenizer = self.processor.tokenizer
        with torch.no_grad():
            ids = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        prompt = inputs["input_ids"]
        new = ids[:, prompt.shape[1] :].cpu()
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        last = handle.last if handle and handle.last is not before else None
        visual = (prompt == self.model.config.image_token_id).sum(1).tolist()
        kept, layers = _counts(last, [len(sample.images) for sample in samples], visual)
        whole = inputs["attention_mask"].sum(1).tolist()
        out = lengths(new, self.model.generation_config.eos_token_id)
        return [
            Answer(
                texts[i].strip(), whole[i] - visual[i] + kept[i], out[i], visual[i], kept[i], seen
            )
            for i, seen in enumerate(layers)
        ]


def _counts(
    last: Any, images: Sequence[int], visual: Sequence[int]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Visual tokens of each sample that entered the language model, and those in its layers."""
    if last is None:
        return [*visual], [()] * len(images)
    after = iter(last.tokens_after)
    kept = [sum(next(after) for _ in range(n)) for n in images]
    if not last.layer_tokens:
        return kept, [()] * len(images)
    return kept, [*zip(*last.layer_tokens, strict=True)]


def lengths(new: Tensor, ends: int | Sequence[int] | None) -> list[int]:
    """Tokens of each answer [B, L] on the CPU, the end included and what is behind it not.

    Args:
        new: generated ids.
        ends: ids that end an answer.
    """
    stops = torch.tensor([-1] if ends is None else [ends] if isinstance(ends, int) else [*ends])
    ended = torch.isin(new, stops)
    return [int(row.int().argmax()) + 1 if row.any() else len(row) for row in ended]
