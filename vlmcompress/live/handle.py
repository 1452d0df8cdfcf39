"""The handle of a patched model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmcompress.core.errors import ConfigError, UnsupportedInputError, VLMCompressError
from vlmcompress.core.report import CallRecord, Report
from vlmcompress.live import calls, decoder, encodingfile, positions
from vlmcompress.live.encode import has_pixels
from vlmcompress.live.encoded import CompressedEncoding
from vlmcompress.live.inside import with_parts
from vlmcompress.live.install import check_evidence, follow_stages, uninstall
from vlmcompress.live.state import Settings, State, state_of
from vlmcompress.live.timing import Stopwatch
from vlmcompress.methods import pipeline
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.limits import refuse_untrained
from vlmcompress.methods.pipeline import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image


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
        by_default = state.settings.chosen_by_default
        return Report(
            model=type(self._model).__name__,
            method=self.config.to_spec(),
            chosen="chosen by default for this tower" if by_default else "as asked",
            positions=self._positions(),
            calls_with_images=state.calls["with"],
            calls_without_images=state.calls["without"],
            last=state.local.last,
        )

    def _positions(self) -> str | None:
        """How position ids run in the language model; None without one."""
        return positions.resolve(self.config.positions, self._state.family)

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

    @property
    def parts(self) -> Learned | None:
        """What a method inside tower or language model learns: a module to train, save and load.

        It is no part of the model. None where nothing is learnt. `set` keeps it as long as what it
        is made for stays the same; other budgets may need others.

        Raises:
            ConfigError: where several methods learn; `parts_of` names one.
        """
        learning = self._state.settings.pipeline.learning
        if len(learning) > 1:
            names = ", ".join(repr(name) for name, _ in learning)
            raise ConfigError(f"{names} learn; use handle.parts_of({learning[0][0]!r}) for one.")
        return learning[0][1] if learning else None

    def parts_of(self, method: str) -> Learned:
        """What the first stage of that method learns.

        Raises:
            ConfigError: when there is none, or it learns nothing.
        """
        learning = self._state.settings.pipeline.learning
        found = [parts for name, parts in learning if name == method]
        if not found:
            names = ", ".join(repr(name) for name, _ in learning) or "none"
            raise ConfigError(f"No stage of method {method!r} learns; those that do: {names}.")
        return found[0]

    def overlay(self, image: Image, unit: int = 0, *, layer: int | None = None) -> Image:
        """The picture with everything dimmed that the language model did not see.

        Args:
            image: the picture the processor was given.
            unit: which image of the last call it was.
            layer: dims what did not get to this layer of the language model; what did not enter it
                at all when not given.
        """
        from vlmcompress.overlay import draw_overlay

        last = self._last_or_raise()
        if not 0 <= unit < len(last.kept):
            raise UnsupportedInputError(
                f"The last call had {len(last.kept)} image(s); there is no image {unit}."
            )
        if layer is not None and last.layer_entrants:
            last = last.at_layer(layer)
        return draw_overlay(image, last, unit, self._state.processor)

    def set(
        self,
        *,
        method: Any = None,
        keep: float | int | str | None = None,
        positions: str | None = None,
        seed: int | None = None,
        force: bool = False,
    ) -> Handle:
        """Change what is applied from the next call on; what is not given stays.

        Args:
            method: as for `patch`.
            keep: as for `patch`; a new method without keep takes over the old one's if there is one
                stage.
            positions: as for `patch`; without a language model there are none to change.
            seed: as for `patch`.
            force: also a budget that an adapter was not trained for.

        Returns:
            The handle itself.

        Raises:
            ConfigError: as `patch` does; nothing is changed then.
        """
        state = self._state
        # A budget that was forced before stays until another is asked for.
        force = force or (keep is None and method is None)
        new = self._rebuilt(method=method, keep=keep, positions=positions, seed=seed, force=force)
        state.settings = Settings(new, state.settings.chosen_by_default and method is None)
        return self

    def _rebuilt(self, *, force: bool = False, **changes: Any) -> Pipeline:
        """The pipeline with some things changed (as `set` names them), ready to run."""
        state, base = self._state, self._model.base_model
        new = pipeline.rebuild(state.settings.pipeline, **changes)
        if not force:
            refuse_untrained(new)
        check_evidence(state.family, base, new, state.clip)
        decoder.check(self._model, state.family, new)
        new = with_parts(state.family, base, new, state.settings.pipeline)
        follow_stages(self._model, state, new)
        return new

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

        Inside `disabled` everything is kept.

        Returns:
            What to pass as `mm_encoder_outputs=` instead of the pixels, with full `input_ids`; it
            is not compressed a second time. `save(path)` writes it to a file.

        Raises:
            UnsupportedInputError: when the call has no image.
        """
        if not has_pixels(call):
            raise UnsupportedInputError(
                "encode(...) was given no image; pass what the processor returns."
            )
        watch = Stopwatch(next(self._model.parameters()).device)
        state = self._state
        pipeline_now = state.settings.pipeline
        if not state.active:
            pipeline_now = pipeline_now.switched_off()
        encoded = calls.encode(self._model, state, pipeline_now, call, watch)
        return CompressedEncoding(encoded, encodingfile.identity(self._model))

    def load_encoding(self, path: str | Path) -> CompressedEncoding:
        """Images that were encoded before, from what `encode(...).save(path)` wrote.

        Returns:
            What to pass as `mm_encoder_outputs=`, as `encode` does.

        Raises:
            CheckpointError: for a file that cannot be used.
            CacheMismatchError: for images that another model has encoded.
        """
        wanted, device = encodingfile.identity(self._model), next(self._model.parameters()).device
        return CompressedEncoding(encodingfile.load(path, wanted, device), wanted)

    def remove(self) -> None:
        """Take everything off; the model is as it came in. A second call does nothing."""
        state = state_of(self._model)
        if state is not None:
            uninstall(self._model, state)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        if state_of(self._model) is None:
            return "Handle(removed)"
        return f"Handle({type(self._model).__name__}, {self.config.to_spec()!r})"
