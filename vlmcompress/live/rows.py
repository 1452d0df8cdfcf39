"""Which columns of a prompt a decoder layer works on, and which its cache holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmcompress.core.placement import kept_columns
from vlmcompress.methods.decoder.base import Positions, Reduction
from vlmcompress.methods.decoder.editing import Marks
from vlmcompress.methods.pipeline import LayerStage


@dataclass(frozen=True)
class Rows:
    """The rows of one call at some depth of the language model.

    Attributes:
        index: [B, R] column of the call that each row is; of its source, for merged rows.
        where: [B, R] column of the call whose position embedding it gets.
        valid: [B, R] bool, rows that are no padding.
        visual: [B, R] bool.
        fresh: [B, R] bool, merged rows, which are no column of the caller's.
        ordinal: [B, R] which of its sample's visual columns a row is, -1 for text.
        unit: [B, R] image of each visual row, -1 for text.
        place: [B, R, 2] its place in the image's grid.
        grid: [B, R, 2] that grid.
        given: [B, R] bool, rows of the prompt; what a draft model has added are not.
        answers: [B, R] bool, or None outside training.
        full: whether every row is valid, known without asking the device.
        whole: whether these are all columns of the call.
        renumbered: whether positions were counted anew.
        soft: [B, R] log of the soft masks so far, 0 for text; None outside training.
        faint: [B, R] bool, rows that would have been dropped outside training; None likewise.
    """

    index: Tensor
    where: Tensor
    valid: Tensor
    visual: Tensor
    fresh: Tensor
    ordinal: Tensor
    unit: Tensor
    place: Tensor
    grid: Tensor
    given: Tensor
    answers: Tensor | None = None
    full: bool = True
    whole: bool = True
    renumbered: bool = False
    soft: Tensor | None = None
    faint: Tensor | None = None

    @classmethod
    def all(
        cls,
        visual: Tensor,
        valid: Tensor,
        *,
        full: bool,
        unit: Tensor | None = None,
        place: Tensor | None = None,
        grid: Tensor | None = None,
        prompt: int | None = None,
        answers: Tensor | None = None,
    ) -> Rows:
        """All columns of a call.

        Args:
            visual: [B, L] bool, visual tokens that may go.
            valid: [B, L] bool, columns that are no padding.
            full: whether all are.
            unit: [B, L], see the attributes.
            place: [B, L, 2].
            grid: [B, L, 2].
            prompt: how many of the columns are the prompt's; all when not given.
            answers: [B, L].
        """
        index = torch.arange(visual.shape[1], device=visual.device).expand(visual.shape)
        pairs = index.new_zeros((*visual.shape, 2))
        return cls(
            index=index,
            where=index,
            valid=valid,
            visual=visual,
            fresh=torch.zeros_like(visual),
            ordinal=torch.where(visual, visual.long().cumsum(1) - 1, -1),
            unit=torch.full_like(index, -1) if unit is None else unit,
            place=pairs if place is None else place,
            grid=pairs + 1 if grid is None else grid,
            given=torch.ones_like(visual) if prompt is None else index < prompt,
            answers=answers,
            full=full,
        )

    @property
    def text(self) -> Tensor:
        """[B, R] bool, text behind the last visual row of each sample."""
        columns = torch.arange(self.visual.shape[1], device=self.visual.device)
        last = torch.where(self.visual, columns, -1).amax(1, keepdim=True)
        return self.valid & self.given & ~self.visual & (columns > last)

    @property
    def last(self) -> Tensor:
        """[B, 1] the last row of each sample's prompt."""
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        return torch.where(self.valid & self.given, columns, 0).amax(1, keepdim=True)

    def spread(self, hidden: Tensor, length: int) -> Tensor:
        """These rows ([B, R, d]) at their columns of a call of that length, zeros elsewhere."""
        if self.whole:
            return hidden
        there = (self.valid & ~self.fresh).to(hidden.device)
        target = torch.where(there, self.index.to(hidden.device), length)
        out = hidden.new_zeros(len(hidden), length + 1, hidden.shape[-1])
        return out.scatter(1, target[..., None].expand_as(hidden), hidden)[:, :-1]

    def taken(self, chosen: Tensor, valid: Tensor, full: bool) -> Rows:
        """Rows `chosen` ([B, R']) of these, some of which are padding."""

        def take(values: Tensor) -> Tensor:
            return torch.take_along_dim(values, _like(chosen, values), 1)

        return dataclasses.replace(
            self,
            index=take(self.index),
            where=take(self.where),
            valid=valid,
            visual=take(self.visual) & valid,
            fresh=take(self.fresh) & valid,
            ordinal=take(self.ordinal),
            unit=take(self.unit),
            place=take(self.place),
            grid=take(self.grid),
            given=take(self.given),
            answers=None if self.answers is None else take(self.answers) & valid,
            soft=None if self.soft is None else take(self.soft),
            faint=None if self.faint is None else take(self.faint) & valid,
            full=full,
            whole=False,
        )

    def reduced(self, by: Reduction, mode: Positions) -> tuple[Rows, Tensor] | None:
        """The rows that a reduction leaves, and where they are found; None when all stay.

        Args:
            by: the reduction.
            mode: whether positions are kept or counted anew.

        Returns:
            The rows, and [B, R'] which of the old rows, followed by the merged ones, each one is.
        """
        rows, stay, order = self, (by.keep | ~self.visual) & self.valid, None
        if by.merged is not None:
            rows, stay, order = self._with_merged(by, stay)
        counts, before = torch.stack([stay.sum(1), self.valid.sum(1)]).tolist()  # the only wait
        if order is None and counts == before:
            return None
        chosen, valid = kept_columns(stay, "left")
        left = rows.taken(chosen, valid, full=min(counts) == max(counts))
        if mode == "contiguous":
            where = self._counted_anew(valid)
            left = dataclasses.replace(left, where=where, renumbered=True)
        return left, chosen if order is None else order.gather(1, chosen)

    def softened(self, by: Reduction) -> Rows:
        """All of these rows, with the soft mask of a reduction on those before it."""
        assert by.soft is not None  # the contract of softening
        soft, faint = by.soft.masked_fill(~self.visual, 0), self.visual & ~by.keep
        if self.soft is not None and self.faint is not None:
            soft, faint = self.soft + soft, self.faint | faint
        return dataclasses.replace(self, soft=soft, faint=faint)

    def among(self, others: Rows) -> Tensor:
        """[B, R] which of `others`, from which these were taken, each row is; 0 for padding."""
        places = torch.arange(others.index.shape[1], device=self.index.device)
        own = torch.where(others.valid & ~others.fresh, others.index, self.index.amax() + 1)
        table = self.index.new_zeros(len(own), int(own.max()) + 1)
        table.scatter_(1, own, places.expand_as(own))
        return torch.where(self.valid, table.gather(1, self.index), 0)

    def _counted_anew(self, valid: Tensor) -> Tensor:
        """[B, R'] columns from each sample's first on, one for each valid row."""
        first = torch.where(self.valid, self.where, self.where.amax() + 1).amin(1, keepdim=True)
        return first + (valid.long().cumsum(1) - 1).clamp(min=0)

    def _with_merged(self, by: Reduction, stay: Tensor) -> tuple[Rows, Tensor, Tensor]:
        """These rows with merged ones behind the last visual row that stays.

        Returns:
            All rows in their new order, which of them stay, and [B, R + m] the old or merged row
            that each one is.
        """
        assert by.source is not None  # the contract of merging
        b, m = by.source.shape
        exists = torch.ones_like(by.source, dtype=torch.bool)
        exists = exists if by.merged_valid is None else by.merged_valid
        columns = torch.arange(stay.shape[1], device=stay.device)
        last = torch.where(self.visual & stay, columns, -1).amax(1, keepdim=True)
        # Without a visual row that stays, merged ones go where the first visual row was.
        first = torch.where(self.visual, columns, stay.shape[1]).amin(1, keepdim=True) - 1
        behind = torch.where(last < 0, first, last).double()
        steps = torch.arange(1, m + 1, device=stay.device, dtype=torch.float64) / (m + 1)
        order = torch.cat([columns.double().expand(b, -1), behind + steps], 1).argsort(1)
        source = torch.cat([columns.expand(b, -1), by.source], 1)
        both = self.taken(source, torch.cat([self.valid, exists], 1), self.full)
        fresh = torch.cat([self.fresh, torch.ones_like(exists)], 1)
        both = dataclasses.replace(both, fresh=fresh)
        stay = torch.cat([stay, exists], 1).gather(1, order)
        return both.taken(order, both.valid.gather(1, order), self.full), stay, order


@dataclass(frozen=True)
class Held:
    """What the cache of one layer holds.

    Attributes:
        seen: [B, C] bool, keys that are no padding.
        full: whether none is, among those that a prompt put there.
        gone: [B] how many positions later tokens are counted back, None for none.
        whole: whether it holds every column of the conversation.
    """

    seen: Tensor
    full: bool
    gone: Tensor | None = None
    whole: bool = True

    def reordered(self, samples: Tensor) -> Held:
        """With the samples in another order ([B])."""
        samples = samples.to(self.seen.device)
        gone = None if self.gone is None else self.gone[samples]
        return dataclasses.replace(self, seen=self.seen[samples], gone=gone)

    def shrunk(self, by: int) -> Held:
        """Without the last `by` keys."""
        return dataclasses.replace(self, seen=self.seen[:, : self.seen.shape[1] - by])

    def grown(
        self, seen: Tensor, full: bool, gone: Tensor | None = None, whole: bool = True
    ) -> Held:
        """With further keys ([B, c])."""
        if gone is not None and self.gone is not None:
            gone = gone + self.gone
        return Held(
            torch.cat([self.seen, seen], 1),
            self.full and full,
            self.gone if gone is None else gone,
            self.whole and whole,
        )


@dataclass(frozen=True)
class LayerRecord:
    """What a cache knows of the prompt it was filled from, layer by layer.

    Attributes:
        layers: what each layer holds of the first `length` columns.
        length: columns of the conversation when it was written.
        settled: columns up to the last visual one; less cannot be held.
        soft: whether it was filled under soft masks, which a later call would not know.
        standing: methods that later calls over it go on with.
        marks: what an editor knows of each layer's keys; empty without one.
        exits: layers that each forward into it has run, where rows may leave early.
    """

    layers: tuple[Held, ...]
    length: int
    settled: int
    soft: bool = False
    standing: tuple[LayerStage, ...] = ()
    marks: tuple[Marks | None, ...] = ()
    exits: list[int] = field(default_factory=list)

    def reordered(self, samples: Tensor) -> LayerRecord:
        """With the samples in another order ([B]), as beams come."""
        held = {id(layer): layer.reordered(samples) for layer in self.layers}
        return dataclasses.replace(
            self,
            layers=tuple(held[id(layer)] for layer in self.layers),
            marks=tuple(m if m is None else m.reordered(samples) for m in self.marks),
        )

    def columns(self, held: int) -> int:
        """Columns of the conversation when layer 0 holds `held` keys."""
        return self.length + held - self.layers[0].seen.shape[1]


def with_merged(hidden: Tensor, by: Reduction) -> Tensor:
    """Rows ([B, R, d]) with their new values, merged ones behind them."""
    rows = hidden if by.hidden is None else by.hidden.to(hidden.dtype)
    if by.merged is None:
        return rows
    return torch.cat([rows, by.merged.to(hidden.dtype)], 1)


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Rows ([B, R']) of [B, R, d]."""
    rows = rows.to(values.device)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, rows)


def _like(index: Tensor, values: Tensor) -> Tensor:
    """[B, R'] as an index into dimension 1 of [B, R, ...]."""
    return index.view(*index.shape, *([1] * (values.ndim - 2)))
