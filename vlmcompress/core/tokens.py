"""The data that flows from the vision tower to the language model.

Pure tensors: nothing here knows a model or transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

SegmentKind = Literal["image", "base", "tile", "frame"]


@dataclass(frozen=True)
class Segment:
    """A rectangle of tokens inside one unit.

    Attributes:
        kind: what the rectangle shows.
        grid: (t, h, w) in tokens.
        slice: its rows in the unit's uncompressed sequence, in raster order.
    """

    kind: SegmentKind
    grid: tuple[int, int, int]
    slice: slice

    def __hash__(self) -> int:
        """Slices have a hash from Python 3.12 on only."""
        return hash((self.kind, self.grid, self.slice.start, self.slice.stop))

    @property
    def length(self) -> int:
        """Number of tokens in the rectangle."""
        t, h, w = self.grid
        return t * h * w


@dataclass(frozen=True)
class Evidence:
    """What methods look at, token by token; only what was asked for is filled.

    Attributes:
        cls_attention: {layer: [b, heads, n]} softmax rows of the [CLS] query, its own column
            removed and the rest not renormalised.
        received_attention: {layer: [b, heads, n]} attention each token receives, averaged over all
            queries.
        keys: {layer: [b, n, heads, head_dim]} keys without [CLS].
        text: [b, m, e] embeddings of the parts of the question; rows of zeros fill up.
        wide_cls_attention: {layer: [b, 1, n]} as `cls_attention`, with all heads taken as one head
            of full width.
        cls_features: [b, d] what the connector would read of [CLS].
        patches: [b, n, e] embeddings of the tokens in the space of `text`.
        norms: [b, n] length of the tower's state that the connector reads.
        outliers: [b, n] bool, tokens that a method with scores ranks after all others.
        states: {layer: [b, n, d]} outputs of tower layers without [CLS].
        question: [b, d_llm] what the language model makes of the question: its last state.

    Layers are absolute indices (0 = first tower layer). Where several patches form one token,
    attention is summed over them; keys, states and lengths are averaged.
    """

    cls_attention: Mapping[int, Tensor] = field(default_factory=dict)
    received_attention: Mapping[int, Tensor] = field(default_factory=dict)
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    text: Tensor | None = None
    wide_cls_attention: Mapping[int, Tensor] = field(default_factory=dict)
    cls_features: Tensor | None = None
    patches: Tensor | None = None
    norms: Tensor | None = None
    outliers: Tensor | None = None
    states: Mapping[int, Tensor] = field(default_factory=dict)
    question: Tensor | None = None

    def take_units(self, units: Tensor) -> Evidence:
        """Evidence of some units only; `units` indexes the first dimension of every tensor."""
        return self._map(lambda value: value[units])

    def select(self, index: Tensor) -> Evidence:
        """Evidence of the tokens at `index` ([b, k], rows of the current sequence)."""

        def columns(attention: Tensor) -> Tensor:
            return _gather(attention.transpose(1, 2), index).transpose(1, 2)

        def rows(values: Tensor | None) -> Tensor | None:
            return None if values is None else _gather(values, index)

        return Evidence(
            {i: columns(a) for i, a in self.cls_attention.items()},
            {i: columns(a) for i, a in self.received_attention.items()},
            {i: _gather(k, index) for i, k in self.keys.items()},
            self.text,
            {i: columns(a) for i, a in self.wide_cls_attention.items()},
            self.cls_features,
            rows(self.patches),
            rows(self.norms),
            rows(self.outliers),
            {i: _gather(s, index) for i, s in self.states.items()},
            self.question,
        )

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Evidence:
        def rows(captured: Mapping[int, Tensor]) -> dict[int, Tensor]:
            return {layer: fn(values) for layer, values in captured.items()}

        def one(value: Tensor | None) -> Tensor | None:
            return None if value is None else fn(value)

        return Evidence(
            rows(self.cls_attention),
            rows(self.received_attention),
            rows(self.keys),
            one(self.text),
            rows(self.wide_cls_attention),
            one(self.cls_features),
            one(self.patches),
            one(self.norms),
            one(self.outliers),
            rows(self.states),
            one(self.question),
        )


@dataclass(frozen=True)
class VisualTokens:
    """A batch of units (images or videos) of equal length n.

    Attributes:
        features: [b, n, d].
        index: [b, n] row in the uncompressed unit (of the representative, for merged tokens).
        mass: [b, n] how many uncompressed tokens each row stands for; pruning leaves 1.
        segments: the rectangles of the *uncompressed* unit.
        owner: [b] index of the image in the call, on the CPU.
        tile: [n_full] int64, which view of the image each row shows: 0 for the whole image, 1 and
            on for the tiles of one that was cut up, -1 for structural rows; None for a single view.
        assignment: [b, n_full] row each uncompressed token went to, -1 where dropped; None while
            untouched.
        evidence: what methods asked for.
        parts: what the method that is about to run has learnt; None where it learns nothing.
    """

    features: Tensor
    index: Tensor
    mass: Tensor
    segments: tuple[Segment, ...]
    owner: Tensor
    tile: Tensor | None = None
    assignment: Tensor | None = None
    evidence: Evidence = field(default_factory=Evidence)
    parts: nn.Module | None = None

    @classmethod
    def from_features(
        cls,
        features: Tensor,
        *,
        segments: tuple[Segment, ...] | None = None,
        owner: Tensor | None = None,
        tile: Tensor | None = None,
        evidence: Evidence | None = None,
    ) -> VisualTokens:
        """Uncompressed tokens.

        Args:
            features: [b, n, d].
            segments: rectangles; one row of n tokens when not given.
            owner: [b]; 0..b-1 when not given.
            tile: [n] int64; a single view when not given.
            evidence: what was captured for these units.
        """
        b, n, _ = features.shape
        device = features.device
        return cls(
            features=features,
            index=torch.arange(n, device=device).expand(b, n),
            mass=torch.ones(b, n, device=device, dtype=torch.float32),
            segments=segments or (Segment("image", (1, 1, n), slice(0, n)),),
            owner=torch.arange(b) if owner is None else owner,
            tile=None if tile is None else tile.to(device),
            evidence=evidence or Evidence(),
        )

    @property
    def n(self) -> int:
        """Tokens per unit now."""
        return self.features.shape[1]

    @property
    def n_full(self) -> int:
        """Tokens per unit before any compression."""
        return self.n if self.assignment is None else self.assignment.shape[1]

    @property
    def structural(self) -> Tensor:
        """[n_full] bool, rows that are newlines or markers."""
        if self.tile is None:
            return torch.zeros(self.n_full, dtype=torch.bool, device=self.features.device)
        return self.tile < 0

    @property
    def current_segments(self) -> tuple[Segment, ...]:
        """The unit's rectangles; one row once an earlier method has thinned them out."""
        if self.n == self.n_full:
            return self.segments
        return (Segment("image", (1, 1, self.n), slice(0, self.n)),)

    def take_units(self, units: Tensor) -> VisualTokens:
        """Some units only; `units` ([m] int64, on the CPU) indexes the batch dimension."""
        return dataclasses.replace(
            self,
            features=self.features[units],
            index=self.index[units],
            mass=self.mass[units],
            owner=self.owner[units],
            assignment=None if self.assignment is None else self.assignment[units],
            evidence=self.evidence.take_units(units),
        )

    def select(self, index: Tensor) -> VisualTokens:
        """Keep the rows at `index` and drop the others.

        Args:
            index: [b, k] int64 rows of the current sequence, unique within a unit.
        """
        return self.regroup(_gather(self.features, index), index, moved_to(index, self.n))

    def regroup(self, features: Tensor, source: Tensor, moved: Tensor) -> VisualTokens:
        """New rows made of the current ones.

        Args:
            features: [b, k, d] of the new rows.
            source: [b, k] int64 current row that represents each new one.
            moved: [b, n] int64 new row that each current one became part of, -1 where dropped.
        """
        # At first, rows are the uncompressed tokens.
        assignment = moved if self.assignment is None else follow(self.assignment, moved)
        return dataclasses.replace(
            self,
            features=features,
            index=self.index.gather(1, source),
            mass=joined_mass(self.mass, moved, source.shape[1]),
            assignment=assignment,
            evidence=self.evidence.select(source),
        )


def moved_to(index: Tensor, n: int, others: int = -1) -> Tensor:
    """Where each of n rows goes when those at `index` ([b, k]) are kept: [b, n], or `others`."""
    number = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return index.new_full((len(index), n), others).scatter_(1, index, number)


def joined_mass(mass: Tensor, moved: Tensor, k: int) -> Tensor:
    """[b, k] masses of new rows from those ([b, n]) of the rows that became part of them.

    Args:
        mass: [b, n].
        moved: [b, n] new row of each, -1 where dropped.
        k: new rows.
    """
    total = mass.new_zeros(len(mass), k)
    return total.scatter_add_(1, moved.clamp(min=0), mass * (moved >= 0))


def follow(assignment: Tensor, moved: Tensor) -> Tensor:
    """An assignment ([b, n_full] rows, -1 where dropped) after its rows have moved ([b, n])."""
    beyond = torch.cat([moved, moved.new_full((len(moved), 1), -1)], dim=1)
    return beyond.gather(1, torch.where(assignment < 0, moved.shape[1], assignment))


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` ([b, k]) of `values` ([b, n, ...])."""
    shape = (*index.shape, *([1] * (values.ndim - 2)))
    return values.gather(1, index.view(shape).expand(*index.shape, *values.shape[2:]))
