"""`patch` and the handle it returns."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vlmcompress.core.errors import (
    AlreadyPatchedError,
    EvidenceError,
    UnsupportedInputError,
    UnsupportedModelError,
    VLMCompressError,
)
from vlmcompress.core.report import CallRecord, Report
from vlmcompress.families import Family, family_of
from vlmcompress.live import calls, positions
from vlmcompress.live.encode import CompressedEncoding, has_pixels
from vlmcompress.live.evidence import EvidenceHooks
from vlmcompress.live.forward import after_forward, before_forward
from vlmcompress.live.generate import generate
from vlmcompress.live.state import ATTRIBUTE, Settings, State, state_of
from vlmcompress.live.timing import Stopwatch
from vlmcompress.live.tower import hook_connector, make_skippable, undo_skippable
from vlmcompress.methods import pipeline
from vlmcompress.methods.stages import Resolved

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel


def patch(
    model: PreTrainedModel | Any,
    method: Any = None,
    *,
    keep: float | int | str | None = None,
    processor: Any = None,
    positions: str = "auto",
    seed: int = 0,
    restore_length: bool = True,
) -> Handle:
    """Compress the visual tokens of `model`, which is called as before.

    Args:
        model: a HuggingFace vision-language model, or a PEFT model around one.
        method: a name (`"vtc_cls"`), a configured method, a `CompressionConfig`, a spec string
            (`"vtc_cls:0.25"`) or a list of these. None chooses `vtc_cls` for towers with [CLS],
            `received_attention` for towers without, and `divprune` where attention cannot be read;
            the choice stands in the report. A method named explicitly never falls back.
        keep: what is *kept*: a float in (0, 1] is a fraction of each image's tokens, an int a count
            per image, `"auto"` is decided per image. None only when the method carries its own
            budget.
        processor: the model's processor; overlays need it where it crops or pads.
        positions: `contiguous` renumbers kept tokens in the language model, `original` keeps their
            ids; `auto` is contiguous for 1-D RoPE and original for M-RoPE.
        seed: for methods that draw numbers.
        restore_length: whether logits outside `generate` get the caller's length (zeros at dropped
            positions). False gives the short ones; `handle.last.token_index` maps them.

    Returns:
        A handle that reports, changes, suspends and removes the compression.

    Raises:
        UnsupportedModelError: for models whose family is not known.
        AlreadyPatchedError: for a patched model.
        EvidenceError: when the method looks at something this tower does not have.
        ConfigError, ConfigTypeError, UnknownMethodError: for bad `method`, `keep`, `positions` or
        `seed`.
    """
    model = _outer(model)
    if state_of(model) is not None:
        raise AlreadyPatchedError(
            f"This {type(model).__name__} is patched already; call handle.remove() on the first "
            "handle (or "
            "vlmcompress.handle_of(model).remove()), or change it with handle.set(...)."
        )
    family = family_of(model)
    _check_seam(model)
    built = pipeline.build(
        method,
        keep,
        default=default_method(family, model.base_model),
        positions=positions,
        seed=seed,
    )
    _check_evidence(family, model.base_model, built)
    state = State(family, Settings(built, method is None), processor, restore_length)
    _install(model, state)
    return Handle(model)


def default_method(family: Family, base: nn.Module) -> str:
    """What `method=None` stands for on this tower."""
    tower = family.tower(base)
    if tower is None:
        return "divprune"
    return "vtc_cls" if tower.has_cls else "received_attention"


def handle_of(model: PreTrainedModel | Any) -> Handle:
    """The handle of a patched model (a deep copy of a patched model is patched too).

    Raises:
        VLMCompressError: when the model is not patched.
    """
    model = _outer(model)
    if state_of(model) is None:
        raise VLMCompressError(
            f"This {type(model).__name__} is not patched; call patch(model, keep=...)."
        )
    return Handle(model)


def _outer(model: Any) -> Any:
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_seam(model: Any) -> None:
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} of this transformers has no mm_encoder_outputs argument; "
            "vlmcompress "
            "needs transformers >= 5.18."
        )


def _check_evidence(family: Family, base: nn.Module, built: pipeline.Pipeline) -> None:
    """Refuse at patch time what could only fail at the first image."""
    needs, tower = built.needs(), family.tower(base)
    if not needs.attention:
        return
    names = ", ".join(repr(s.method.name) for s in built.stages if s.method.needs().attention)
    if tower is None:
        raise EvidenceError(
            f"{names} read(s) tower attention, which cannot be read from this {family.model_type} "
            "tower; use a "
            "method that needs none, such as 'divprune'."
        )
    if needs.cls_attention and not tower.has_cls:
        raise EvidenceError(
            f"{names} read(s) [CLS] attention and this {family.model_type} tower has no [CLS] "
            "token; use "
            "'received_attention' or 'divprune'."
        )
    Resolved.of(needs, len(tower.layers(family.tower_module(base))))


def _install(model: Any, state: State) -> None:
    base, family = model.base_model, state.family
    tower = family.tower(base)
    if tower is not None:
        layers = tower.layers(family.tower_module(base))
        state.evidence = EvidenceHooks(tower, layers)
        make_skippable(layers)
    connector = family.connector(base)
    if connector is not None:
        state.handles.append(hook_connector(connector))
    state.handles.append(model.register_forward_pre_hook(before_forward, with_kwargs=True))
    state.handles.append(model.register_forward_hook(after_forward, with_kwargs=True))
    model.__dict__["generate"] = types.MethodType(generate, model)
    model.__dict__[ATTRIBUTE] = state


def _uninstall(model: Any, state: State) -> None:
    base, family = model.base_model, state.family
    tower = family.tower(base)
    if tower is not None:
        undo_skippable(tower.layers(family.tower_module(base)))
    if state.evidence is not None:
        state.evidence.remove()
    for handle in state.handles:
        handle.remove()
    del model.__dict__["generate"], model.__dict__[ATTRIBUTE]


class Handle:
    """What `patch` returns: report, change, suspend and remove the compression of one model.

    Usable as a context manager that removes the patch at its end.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def model(self) -> Any:
        """The patched model."""
        return self._model

    @property
    def _state(self) -> State:
        state = state_of(self._model)
        if state is None:
            raise VLMCompressError("The patch was removed; call patch(model, ...) again.")
        return state

    @property
    def report(self) -> Report:
        """Counts, costs and choices so far; `print` it."""
        state = self._state
        config = state.settings.pipeline.config
        return Report(
            model=type(self._model).__name__,
            method=config.to_spec(),
            chosen="chosen by default for this tower"
            if state.settings.chosen_by_default
            else "as asked",
            positions=positions.resolve(config.positions, state.family),
            calls_with_images=state.calls["with"],
            calls_without_images=state.calls["without"],
            last=state.local.last,
        )

    @property
    def config(self) -> Any:
        """The `CompressionConfig` in force."""
        return self._state.settings.pipeline.config

    @property
    def last(self) -> CallRecord | None:
        """Record of this thread's last compressed call."""
        return self._state.local.last

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """Per image of the last call, kept rows of the uncompressed image.

        Raises:
            VLMCompressError: when this thread has made no compressed call yet.
        """
        return self._last_or_raise().kept

    def _last_or_raise(self) -> CallRecord:
        last = self.last
        if last is None:
            raise VLMCompressError(
                "No call with an image was made in this thread yet; call the model first."
            )
        return last

    def overlay(self, image: Image, unit: int = 0) -> Image:
        """The picture with everything dimmed that the language model did not see.

        Args:
            image: the picture the processor was given.
            unit: which image of the last call it was.
        """
        from vlmcompress.overlay import draw_overlay

        last = self._last_or_raise()
        if not 0 <= unit < len(last.kept):
            raise UnsupportedInputError(
                f"The last call had {len(last.kept)} image(s); there is no image {unit}."
            )
        return draw_overlay(image, last, unit, self._state.processor)

    def set(
        self,
        *,
        method: Any = None,
        keep: float | int | str | None = None,
        positions: str | None = None,
        seed: int | None = None,
    ) -> Handle:
        """Change what is applied from the next call on; what is not given stays.

        Args:
            method: as for `patch`.
            keep: as for `patch`; a new method without keep takes over the old one's if there is one
                stage.
            positions: as for `patch`.
            seed: as for `patch`.

        Returns:
            The handle itself.
        """
        state = self._state
        new = pipeline.rebuild(
            state.settings.pipeline, method=method, keep=keep, positions=positions, seed=seed
        )
        _check_evidence(state.family, self._model.base_model, new)
        state.settings = Settings(new, state.settings.chosen_by_default and method is None)
        return self

    @contextmanager
    def disabled(self) -> Iterator[Handle]:
        """Calls of this thread inside run uncompressed."""
        local = self._state.local
        local.disabled += 1
        try:
            yield self
        finally:
            local.disabled -= 1

    def encode(self, **call: Any) -> CompressedEncoding:
        """Encode and compress the images of a call once, for many questions.

        Returns:
            What to pass as `mm_encoder_outputs=` instead of the pixels, with full `input_ids`; it
            is not compressed a second time.

        Raises:
            UnsupportedInputError: when the call has no image.
        """
        if not has_pixels(call):
            raise UnsupportedInputError(
                "encode(...) was given no image; pass what the processor returns."
            )
        watch = Stopwatch(next(self._model.parameters()).device)
        return CompressedEncoding(calls.encode(self._model, self._state, call, watch))

    def remove(self) -> None:
        """Take everything off; the model is as it came in. A second call does nothing."""
        state = state_of(self._model)
        if state is not None:
            _uninstall(self._model, state)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        if state_of(self._model) is None:
            return "Handle(removed)"
        return f"Handle({type(self._model).__name__}, {self.config.to_spec()!r})"
