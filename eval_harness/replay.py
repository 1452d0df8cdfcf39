"""Run the vision tower once per image and ask many configurations about it.

One pass records the tower's output and the evidence that all methods together ask for. Later passes
get the recorded output in place of the tower's, and methods the recorded evidence; selection,
connector, placement and language model are the library's own. What a configuration keeps of an
image is decided once for all questions about it, unless it depends on the question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eval_harness.controls import CoveragePruner
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.live.encode import PIXEL_ARGUMENTS
from vlmcompress.live.encoded import CompressedEncoding, pooled
from vlmcompress.methods import pipeline
from vlmcompress.methods.base import Layer, Method, Needs, TokenCompressor, resolve_layer


@dataclass(init=False, eq=False)
class Recorder(TokenCompressor):
    """Keeps one token and notes the evidence it was shown."""

    name: ClassVar[str] = "recorder"

    def __init__(self, needs: Needs) -> None:
        """With nothing recorded yet of these needs."""
        self._needs = needs
        self.seen: list[VisualTokens] = []

    def needs(self) -> Needs:
        """What is recorded."""
        return self._needs

    def tokens_kept(self, segments: Sequence[Segment], keep: float | int) -> int:
        """One."""
        return 1

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """The first token of each image."""
        self.seen.append(tokens)
        return tokens.select(tokens.index.new_zeros(len(tokens.owner), 1))


@dataclass(init=False, eq=False)
class Remembering(TokenCompressor):
    """A method that is shown recorded evidence instead of the tower's."""

    def __init__(
        self, inner: TokenCompressor, evidence: Evidence, images: Tensor, depth: int
    ) -> None:
        """Of a method.

        Args:
            inner: the method.
            evidence: of the recorded images.
            images: [rows] recorded image of each image of the call.
            depth: layers of the tower.
        """
        self.inner, self.images = inner, images
        self.evidence = _asked_for(inner.needs(), evidence, depth)
        self.name, self.reads, self.scored = inner.name, inner.reads, inner.scored  # type: ignore[misc]
        self.training_free = inner.training_free  # type: ignore[misc]
        self.partition = inner.partition  # type: ignore[misc]

    def needs(self) -> Needs:
        """Nothing of the tower."""
        return Needs(text=self.inner.needs().text)

    @property
    def raster_order(self) -> bool:
        """As the method says."""
        return self.inner.raster_order

    def tokens_kept(self, segments: Sequence[Segment], keep: float | int) -> int:
        """As the method says."""
        return self.inner.tokens_kept(segments, keep)

    def allocate(self, units: Sequence[Sequence[Segment]], keep: float | int) -> list[int]:
        """As the method says."""
        return self.inner.allocate(units, keep)

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """As the method does, looking at what was recorded."""
        evidence = self.evidence.take_units(self.images[tokens.owner])
        evidence = dataclasses.replace(evidence, text=tokens.evidence.text)
        return self.inner.compress(dataclasses.replace(tokens, evidence=evidence), keep)


def _asked_for(needs: Needs, have: Evidence, depth: int) -> Evidence:
    def pick(layers: tuple[Layer, ...], rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        # In the order of the method's layers, which it may rely on.
        return {i: rows[i] for i in (resolve_layer(layer, depth) for layer in layers)}

    return Evidence(
        pick(needs.cls_attention, have.cls_attention),
        pick(needs.received_attention, have.received_attention),
        pick(needs.keys, have.keys),
        wide_cls_attention=pick(needs.wide_cls_attention, have.wide_cls_attention),
        cls_features=have.cls_features,
    )


def union(methods: Sequence[Method]) -> Needs:
    """The tower evidence that these methods ask for together."""
    needs = [method.needs() for method in methods]
    return Needs(
        tuple({layer: None for n in needs for layer in n.cls_attention}),
        tuple({layer: None for n in needs for layer in n.received_attention}),
        tuple({layer: None for n in needs for layer in n.keys}),
        wide_cls_attention=tuple({layer: None for n in needs for layer in n.wide_cls_attention}),
        cls_features=any(n.cls_features for n in needs),
    )


@dataclass(frozen=True)
class Recording:
    """What the tower made of the different images of a batch whose rows share images.

    Attributes:
        tower: the module.
        output: its output, one row per different image.
        evidence: of the different images.
        images: [rows] image of each row.
        first: [different images] a row that shows it.
    """

    tower: nn.Module
    output: Any
    evidence: Evidence
    images: Tensor
    first: Tensor

    def method(self, method: Any) -> Any:
        """The method with the recorded evidence, or itself when it looks at none."""
        if not isinstance(method, TokenCompressor) or not method.needs().attention:
            return method
        device = self.images.device
        places = torch.arange(len(self.first), device=device) if shared(method) else self.images
        return Remembering(method, self.evidence, places, depth(self.tower))

    def seen(self, handle: Any, inputs: Mapping[str, Tensor], method: Any) -> Mapping[str, Any]:
        """The inputs with every different image encoded once, as the handle is set.

        Args:
            handle: set to the method.
            inputs: of the batch.
            method: what is applied; one that reads the question gets the inputs as they are.
        """
        if not shared(method):
            return inputs
        unique = {name: value[self.first.to(value.device)] for name, value in inputs.items()}
        with torch.no_grad():
            encoding = handle.encode(**unique)
        rest = {name: value for name, value in inputs.items() if name not in PIXEL_ARGUMENTS}
        return {**rest, "mm_encoder_outputs": repeated(encoding, self.images.tolist())}

    @contextmanager
    def replayed(self, method: Any = None) -> Iterator[None]:
        """Calls of the tower return the recorded output in the body of the `with`.

        Args:
            method: what is applied; one that acts inside the tower or reads the states of its
                layers, or a spec string, whose stages may do either, gets the tower itself.
        """
        if isinstance(method, str) or _runs_tower(method):
            yield
            return
        images = self.images
        output = (
            self.output if shared(method) else _map(self.output, lambda x: x[images.to(x.device)])
        )
        before = self.tower.__dict__.get("forward")
        # The caller may write into the output, so each call gets a new one.
        self.tower.__dict__["forward"] = lambda *args, **kwargs: _copy(output)
        try:
            yield
        finally:
            del self.tower.__dict__["forward"]
            if before is not None:
                self.tower.__dict__["forward"] = before


def built(method: Any) -> pipeline.Pipeline:
    """The pipeline of a method, with some budget where it has none of its own."""
    try:
        return pipeline.build(method)
    except ConfigError:
        return pipeline.build(method, keep=1)


def shared(method: Any) -> bool:
    """Whether all questions about an image see the same of it under a method."""
    if isinstance(method, str):
        return not built(method).needs().asks
    inside = getattr(method, "stage", "") in ("tower", "connector")
    return inside and not method.needs().asks and not isinstance(method, CoveragePruner)


def repeated(encoding: CompressedEncoding, images: Sequence[int]) -> CompressedEncoding:
    """An encoding with one entry per row: `images[i]` of the given one in row i."""
    encoded = encoding.encoded

    def rows(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[i] for i in images)

    stacked = isinstance(encoded.output.pooler_output, Tensor)
    features = pooled(list(rows(encoded.features)), stacked)
    return CompressedEncoding(
        dataclasses.replace(
            encoded,
            output=type(encoded.output)(pooler_output=features),
            lengths=rows(encoded.lengths),
            kept=rows(encoded.kept),
            segments=rows(encoded.segments),
            assignments=rows(encoded.assignments),
            heard=rows(encoded.heard) if encoded.heard else (),
            whole=rows(encoded.whole) if encoded.whole else (),
        )
    )


def _runs_tower(method: Any) -> bool:
    inside = getattr(method, "stage", "") == "tower"
    return inside or (isinstance(method, Method) and bool(method.needs().states))


@dataclass(frozen=True)
class NoRecording:
    """Stands in where nothing could be recorded: every pass runs the tower."""

    def method(self, method: Any) -> Any:
        """The method itself."""
        return method

    def seen(self, handle: Any, inputs: Mapping[str, Tensor], method: Any) -> Mapping[str, Any]:
        """The inputs as they are."""
        return inputs

    def replayed(self, method: Any = None) -> Any:
        """An empty context."""
        return nullcontext()


def record(
    model: nn.Module,
    tower: nn.Module,
    handle: Any,
    batch: Mapping[str, Tensor],
    images: Tensor,
    needs: Needs,
) -> Recording | NoRecording:
    """Run the tower once on each different image of a batch with one image per row.

    Args:
        model: a patched model.
        tower: its vision tower.
        handle: its handle; the method it is set to is lost.
        batch: the model's inputs, tensors with the rows first.
        images: [rows] which image each row shows; equal numbers, equal images.
        needs: the evidence to keep.

    Returns:
        The recording, or `NoRecording` for models whose inputs or tower output are not one row per
        image.
    """
    if any(len(value) != len(images) for value in batch.values()):
        return NoRecording()
    first = torch.stack([(images == i).nonzero()[0, 0] for i in range(int(images.max()) + 1)])
    unique = {name: value[first.to(value.device)] for name, value in batch.items()}
    outputs: list[Any] = []
    # A copy, since the model goes on to write its image features into the tower's output.
    hook = tower.register_forward_hook(lambda module, args, output: outputs.append(_copy(output)))
    recorder = Recorder(needs)
    handle.set(method=recorder, keep=1)
    try:
        with torch.no_grad():
            model(**unique, logits_to_keep=1)
    finally:
        hook.remove()
    whole = len(outputs) == len(recorder.seen) == 1 and _one_row_per_image(outputs[0], len(first))
    if not whole:
        return NoRecording()
    rows = images.to(batch["input_ids"].device)
    return Recording(tower, outputs[0], recorder.seen[0].evidence, rows, first)


def depth(tower: nn.Module) -> int:
    """Layers of a transformers vision tower."""
    config: Any = tower.config
    return getattr(config, "num_hidden_layers", None) or config.depth


def _one_row_per_image(output: Any, images: int) -> bool:
    seen: set[int] = set()
    _map(output, lambda x: seen.add(x.shape[0]))
    return seen == {images}


def _copy(output: Any) -> Any:
    return _map(output, lambda x: x)


def _map(value: Any, fn: Any) -> Any:
    """A copy of a model output with every tensor mapped; lists and tuples of tensors included."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, list | tuple) and not hasattr(value, "keys"):
        return type(value)(_map(v, fn) for v in value)
    if hasattr(value, "items"):
        return type(value)(**{k: _map(v, fn) for k, v in value.items()})
    return value
