"""Looking at every layer's attention without dropping anything: what FitPrune is fitted to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.methods.base import CountKind
from vlmcompress.methods.decoder.attending import received
from vlmcompress.methods.decoder.base import DecoderState, LayerReducer, Reads, Reduction, Site
from vlmcompress.methods.decoder.fitting import Sample


@dataclass
class _Memory:
    """One call: what was received in each layer, and which rows are visual and valid."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class AttentionStatistics(LayerReducer):
    """Keeps all tokens and remembers, layer by layer, the attention that they receive.

    It is no method of the registry: an instance belongs to one model and is read with `take`.
    """

    name: ClassVar[str] = "attention_statistics"
    reads: ClassVar[Reads] = "own"
    count_kind: ClassVar[CountKind] = "content"

    def __post_init__(self) -> None:
        """Begin with nothing."""
        self._forget()

    def _forget(self) -> None:
        # No field: options are what a configuration is made of.
        object.__setattr__(self, "memory", _Memory())

    @property
    def own_budget(self) -> bool:
        """All stay."""
        return True

    def sites(self, depth: int) -> tuple[Site, ...]:
        """In every layer."""
        return tuple(Site(layer, "between") for layer in range(depth))

    def counts(self, n: int, keep: float | int | None, depth: int) -> tuple[int, ...]:
        """All."""
        return (n,) * depth

    def reduce(self, site: int, state: DecoderState, k: Tensor) -> Reduction:
        """Remember, and keep all."""
        memory: _Memory = vars(self)["memory"]
        memory.rows = state.visual.cpu(), state.valid.cpu()
        own, cross = (received(state, rows).cpu() for rows in (state.visual, state.text))
        memory.layers.append((own, cross))
        return Reduction(torch.ones_like(state.visual))

    def take(self) -> list[Sample]:
        """What was remembered of one call, a sample for every prompt with an image; forgotten."""
        memory: _Memory = vars(self)["memory"]
        if memory.rows is None:
            return []
        own, cross = (torch.stack([layer[i] for layer in memory.layers], 1) for i in (0, 1))
        visual, valid = memory.rows
        self._forget()
        return [
            Sample(own[b][:, rows], cross[b][:, rows], int((valid[b] & ~rows).sum()))
            for b, rows in enumerate(visual)
            if rows.any()
        ]
