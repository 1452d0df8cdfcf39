"""The module that is trained: the patched model and its losses on the tokens of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eval_harness.replay import repeated
from vlmcompress.core.errors import CheckpointError, ConfigError
from vlmcompress.live.encode import PIXEL_ARGUMENTS, has_pixels
from vlmcompress.live.encoded import CompressedEncoding
from vlmcompress.live.state import state_of
from vlmcompress.methods.decoder.atp import budget_loss
from vlmcompress.methods.pipeline import Pipeline
from vlmcompress.training import aligning
from vlmcompress.training.conversations import SHOWN
from vlmcompress.training.distil import AnswerTokens, answer_losses


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        distil: weight of the distance from the uncompressed model, the rest is that of the answers.
        temperature: of both distributions.
        target: for thresholds that learn how much they let through: wanted mean over layers of the
            share of visual tokens.
    """

    distil: float = 0.0
    temperature: float = 1.0
    target: float | None = None


class Trainee(nn.Module):
    """A patched PEFT model, and what its methods learn, as one module with a loss.

    Its state dict holds what is trained and nothing else: a checkpoint of a large model is small.

    Attributes:
        model: the PEFT model; patched.
        parts: what methods learn, if it is trained along.
        aligning: whether the loss is the distance between compressed rows and the model's own, see
            `aligning`; the language model does not run then.
        sums: what was met since `drain`, summed over tokens.
    """

    def __init__(self, model: Any, handle: Any, objective: Objective, *, train_parts: bool) -> None:
        super().__init__()
        self.model = model
        learning = learning_of(handle) if train_parts else {}
        if train_parts and not learning:
            raise ConfigError(
                f"{handle.config.to_spec()!r} learns nothing that could be trained along; leave "
                "train_parts out."
            )
        self.parts = nn.ModuleDict(learning).requires_grad_(True)
        self._handle, self._objective = handle, objective
        self.aligning = False
        self.sums: Counter[str] = Counter()

    def forward(self, num_items_in_batch: Tensor | int | None = None, **inputs: Any) -> Any:
        """Loss of a batch.

        Args:
            num_items_in_batch: tokens of answers in all batches of the step; those of this one if
                not given.
            inputs: of the model, with `labels` [B, L].

        Returns:
            `{"loss": scalar}`.
        """
        answers = AnswerTokens.of(inputs.pop("labels"))
        shown = inputs.pop(SHOWN, None)
        count = len(answers.tokens) if num_items_in_batch is None else num_items_in_batch
        if self.aligning:
            return {"loss": self._apart(inputs, shown) * (len(answers.tokens) / count)}
        teacher = self._taught(inputs, shown, answers) if self._objective.distil else None
        seen = self._seen(inputs, shown, share=_shareable(_pipeline(self._handle)))
        student = answers.logits(self._logits(inputs, seen, answers))
        extra = self._budget()  # of the student's pass, whose record the handle has now
        entropy, distance = answer_losses(
            student, answers.tokens, teacher, self._objective.temperature
        )
        weight = self._objective.distil
        total = (1 - weight) * entropy + weight * distance
        self._note(student, answers, entropy, distance)
        return {"loss": total / count + extra * (len(answers.tokens) / count)}

    def _taught(
        self, inputs: Mapping[str, Any], shown: Tensor | None, answers: AnswerTokens
    ) -> Tensor:
        """The same model's logits with everything kept and nothing learnt."""
        with self._whole():
            seen = self._seen(inputs, shown, share=True)
            return answers.logits(self._logits(inputs, seen, answers))

    def _apart(self, inputs: Mapping[str, Any], shown: Tensor | None) -> Tensor:
        """How far compressed images are from those of the model itself."""
        if not has_pixels(inputs):  # nothing to learn, of every part
            nothing: Tensor = sum(0.0 * p.sum() for p in self.parts.parameters())  # type: ignore[assignment]
            return nothing
        pipeline = _pipeline(self._handle)
        made = self._ahead(inputs, shown, share=_shareable(pipeline))
        with self._whole():
            whole = self._ahead(inputs, shown, share=True)
        placeless = aligning.aligned(pipeline).placeless
        return aligning.distance(made.encoded, whole.encoded, placeless=placeless)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Everything is kept, nothing is learnt."""
        with torch.no_grad(), self._handle.disabled(), self._plain():
            yield

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """The model without its adapter and without dropout."""
        training = self.model.training
        with ExitStack() as stack:
            stack.enter_context(self.model.disable_adapter())
            # Linear maps have no dropout. Quantised ones outside of training repack their weights
            # on some CPUs, and from then on no gradient goes through them.
            for module in self.model.modules():
                module.training = isinstance(module, nn.Linear)
            try:
                yield
            finally:
                self.model.train(training)

    def _logits(
        self, inputs: Mapping[str, Any], seen: CompressedEncoding | None, answers: AnswerTokens
    ) -> Tensor:
        """[B, C, V] at the columns that predict answers."""
        call = dict(inputs)
        if seen is not None:
            call = {name: value for name, value in call.items() if name not in PIXEL_ARGUMENTS}
            call["mm_encoder_outputs"] = seen
        output = self.model(**call, use_cache=False, logits_to_keep=answers.columns)
        logits: Tensor = output.logits
        return logits

    def _seen(
        self, inputs: Mapping[str, Any], shown: Tensor | None, *, share: bool
    ) -> CompressedEncoding | None:
        """The images of a batch, where they are better encoded ahead of the pass.

        Args:
            inputs: of the model.
            shown: [B] which image each row shows; None where that is not known.
            share: whether equal images may go through the tower once.
        """
        if not (share and _told_apart(inputs, shown)):
            return None
        return self._ahead(inputs, shown, share=True)

    def _ahead(
        self, inputs: Mapping[str, Any], shown: Tensor | None, *, share: bool
    ) -> CompressedEncoding:
        """The images of a batch, which has some, encoded; arguments as for `_seen`."""
        if share and shown is not None and _told_apart(inputs, shown):
            images = shown.tolist()
            first = [images.index(image) for image in range(max(images) + 1)]
            pixels = inputs["pixel_values"][first]
            return repeated(self._handle.encode(pixel_values=pixels), images)
        encoded: CompressedEncoding = self._handle.encode(**inputs)
        return encoded

    def _budget(self) -> Tensor | float:
        """What thresholds that learn how much they let through add to the loss."""
        masks = getattr(self._handle.last, "soft_masks", ())
        if not self.parts or not masks:
            return 0.0
        if self._objective.target is None:
            raise ConfigError(
                "The thresholds of this method learn how much they let through; give a target, "
                "the mean over layers of the share of visual tokens wanted."
            )
        depth = len(self._handle.last.layer_lengths)
        return budget_loss(masks, depth, self._objective.target)

    @torch.no_grad()
    def _note(
        self, student: Tensor, answers: AnswerTokens, entropy: Tensor, distance: Tensor
    ) -> None:
        right = (student.argmax(-1) == answers.tokens).sum()
        found = {"answers": entropy, "distil": distance, "right": right}
        for name, value in found.items():
            self.sums[name] += value.detach().double()  # type: ignore[assignment]
        self.sums["tokens"] += len(answers.tokens)

    def check_alignable(self) -> None:
        """See that compressed rows could be pulled to the model's own.

        Raises:
            ConfigError: when no trained weights make them.
        """
        aligning.aligned(_pipeline(self._handle))

    def drain(self) -> Tensor:
        """Sums of `answers`, `distil`, `right` and `tokens` so far ([4] float64), from 0 again."""
        names = ("answers", "distil", "right", "tokens")
        device = next(self.model.parameters()).device
        found = [torch.as_tensor(self.sums[n], dtype=torch.float64, device=device) for n in names]
        self.sums.clear()
        return torch.stack(found)

    def learning(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round what is trained, buffers included, to numbers of a dtype; it stays in its own."""
        for value in (*self.learning().values(), *self.parts.buffers()):
            if value.is_floating_point():
                value.copy_(value.to(dtype))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What is trained."""
        return {name: p.detach().contiguous() for name, p in self.learning().items()}

    @torch.no_grad()
    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take over what was trained.

        Raises:
            CheckpointError: for names or sizes that differ.
        """
        own = self.learning()
        shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
        if shapes != {name: tuple(p.shape) for name, p in own.items()}:
            raise CheckpointError(
                "The checkpoint holds other trained weights than this run; resume with the options "
                "of the run, or start anew with resume=False."
            )
        for name, parameter in own.items():
            parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])


def _pipeline(handle: Any) -> Pipeline:
    state = state_of(handle.model)
    assert state is not None  # a handle that was removed raises before
    return state.settings.pipeline


def learning_of(handle: Any) -> dict[str, nn.Module]:
    """Parts of every stage that learns, by method."""
    return dict(_pipeline(handle).learning)


def _told_apart(inputs: Mapping[str, Any], shown: Tensor | None) -> bool:
    """Whether it is known which images of a batch are equal."""
    pixels = inputs.get("pixel_values")
    return pixels is not None and shown is not None and len(pixels) == len(shown)


def _shareable(pipeline: Pipeline) -> bool:
    """Whether all rows that show an image see the same of it."""
    return not pipeline.needs().asks and not pipeline.shares_prompts
