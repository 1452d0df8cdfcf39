"""One forward of a language model whose layers work on fewer and fewer rows.

Each layer is handed the rows that are left, and what runs along them: position embeddings taken at
their columns, and a mask made for them by transformers itself, from the padding of what is left and
the length of that layer's own cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.report import SoftMask
from vlmcompress.families.decoders import Decoder
from vlmcompress.live import softening
from vlmcompress.live.beside import Beside
from vlmcompress.live.columns import Columns
from vlmcompress.live.halves import Halves
from vlmcompress.live.kernels import call_kernel
from vlmcompress.live.look import Look
from vlmcompress.live.routing import Routes, joined, parted
from vlmcompress.live.rows import LayerRecord, Rows, take_rows, with_merged
from vlmcompress.methods.decoder.base import (
    DecoderState,
    LayerReducer,
    Positions,
    Reduction,
    Site,
)
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.pipeline import LayerStage


@dataclass(frozen=True)
class Act:
    """One site of one stage.

    Attributes:
        site: where.
        method: what acts there.
        number: of the site among the method's.
        left: per sample, how many visual tokens it may leave.
        parts: what the method has learnt.
    """

    site: Site
    method: LayerReducer
    number: int
    left: tuple[int, ...]
    parts: Learned | None = None


class LayerRun:
    """The state of one forward.

    Attributes:
        decoder: the language model.
        halves: of a layer that runs in two.
        look: at the attention of a layer.
        lengths: rows that went through each layer's attention and through its MLP.
        soft_masks: in training, the soft mask of each site so far.
    """

    def __init__(
        self,
        decoder: Decoder,
        parts: Mapping[nn.Module, int],
        rows: Rows,
        *,
        acts: Sequence[Act] = (),
        beside: Sequence[LayerStage] = (),
        log: list[int] | None = None,
        mode: Positions | None = None,
        mask: Tensor | None = None,
        past: LayerRecord | None = None,
        square_masks: bool = False,
        attach: Callable[[Any, LayerRecord], None] | None = None,
    ) -> None:
        """Prepare a forward.

        Args:
            decoder: the language model.
            parts: its layers and what in them is hooked, with the number of the layer.
            rows: all columns of this call.
            acts: what is dropped where, in the order of depth.
            beside: methods that drop nothing: editors, routers, early exits.
            log: layers that forwards before this one have run, for an early exit.
            mode: positions behind each site; None for each method's own choice.
            mask: [B, T] 2-D attention mask over the whole conversation, None for all ones.
            past: what the call's cache knows of earlier turns, None for an empty cache or one that
                was never cut.
            square_masks: whether masks are cut out of the model's own, where rows see later ones.
            attach: called with the cache and what it holds, once the forward is done.
        """
        self.decoder, self._parts = decoder, parts
        self._acts, self._mode, self._attach = acts, mode, attach
        self._all = self._rows = rows
        self._columns = Columns(decoder, rows, mask, past, square_masks)
        self.look = Look(decoder, self._columns)
        self.halves = Halves()
        self._beside = Beside(beside, decoder, self._columns, past, log)
        self._layer = -1
        self._earlier: Tensor | None = None
        self._embedded: Tensor | None = None
        self._notes: dict[int, Tensor] = {}
        self._went: list[Rows] = []  # through each layer's attention
        self._held: list[Rows] = []  # in its cache, which may be cut later
        self.lengths: list[tuple[int, int]] = []
        self.soft_masks: list[SoftMask] = []

    @property
    def exits(self) -> list[int] | None:
        """Layers that each forward of the conversation has run; None without an early exit."""
        return None if self._beside.exits is None else self._beside.exits.log

    @property
    def written(self) -> int:
        """Rows whose keys and values alone were made, over all layers."""
        passed = self._went[len(self._went) - self._beside.skipped :]
        return sum(rows.index.shape[1] for rows in passed)

    def owns(self, module: nn.Module) -> bool:
        """Whether a layer, or a part of one, belongs to this forward."""
        return module in self._parts

    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """Visual tokens of each sample that went through each layer's attention."""
        counts = torch.stack([rows.visual.sum(1) for rows in self._went])
        counts[len(self.lengths) - self._beside.skipped :] = 0
        return tuple(tuple(row) for row in counts.tolist())

    def entrants(self, batch: int) -> tuple[Tensor, ...]:
        """Per layer [batch, R], which of all visual tokens of the call each row is, -1 for others.

        Args:
            batch: samples of the call, whose rows beams repeat.
        """
        copies = len(self._all.visual) // batch
        counts = self._all.visual[::copies].sum(1)
        before = (counts.cumsum(0) - counts)[:, None]

        def numbers(rows: Rows) -> Tensor:
            own = rows.visual[::copies] & ~rows.fresh[::copies]
            return torch.where(own, before + rows.ordinal[::copies], -1)

        return tuple(numbers(rows) for rows in self._went)

    # One layer ------------------------------------------------------------------------------------

    def block(
        self, layer: nn.Module, forward: Callable[..., Any], hidden: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """The output of a layer on the rows that are left.

        Args:
            layer: the layer.
            forward: its own.
            hidden: [B, R, d].
            kwargs: what the model hands to every layer, made for all columns.
        """
        self._layer = self._parts[layer]
        if self._layer == 0:
            self._columns.begin(kwargs.get("past_key_values"))
            if any(act.method.reads_embedded for act in self._acts):
                self._embedded = hidden
        if self._beside.left:
            return self._passed_over(layer, hidden, kwargs)
        for act in self._at("before"):
            hidden = self._reduce(act, layer, hidden, kwargs)
        self._columns.heal(self._layer)
        if self._reads_next("features"):
            self._earlier = hidden
        rows, routes = self._rows, self._beside.routes_at(self._layer)
        if routes is None:
            output = self._through(layer, forward, hidden, kwargs)
        else:
            output = self._routed(routes, layer, forward, hidden, kwargs)
        self._beside.behind(self._layer, (hidden, rows), (output, self._rows))
        return output

    def _enter(self, rows: Rows) -> None:
        """Note what a layer works on."""
        self._went.append(rows)
        self._held.append(rows)

    def _through(
        self, layer: nn.Module, forward: Callable[..., Any], hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """The layer on the rows that are worked on."""
        self._enter(self._rows)
        self._beside.enter(self._layer, self._rows, hidden)
        arguments = self._columns.arguments(self._layer, self._rows, hidden, kwargs)
        between, length = self._at("between"), hidden.shape[1]
        if between:

            def reduce(hidden: Tensor) -> Tensor:
                for act in between:
                    hidden = self._reduce(act, layer, hidden, kwargs)
                return hidden

            output = self.halves.run(partial(forward, whole=False, **arguments), hidden, reduce)
        else:
            edited = self._beside.edits_at(self._layer) is not None
            output = forward(hidden, whole=not edited, **arguments)
        self.lengths.append((length, output.shape[1]))
        return output

    def _routed(
        self,
        routes: Routes,
        layer: nn.Module,
        forward: Callable[..., Any],
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The layer on a part of the rows, and all rows behind it."""
        everything = self._rows
        route = routes.route(self._layer, self._state(hidden, routes.parts))
        self._rows, chosen = parted(everything, route)
        some = take_rows(hidden, chosen)
        output = self._through(layer, forward, some, kwargs)
        rows, self._rows = self._rows, everything
        self._columns.forget(rows)
        return joined(hidden, output, rows, chosen, route.weight)

    def _passed_over(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A layer behind the exit: its cache gets the keys and values of the rows that left."""
        self._columns.heal(self._layer)
        self._enter(self._rows)
        self.lengths.append((0, 0))
        self._beside.enter(self._layer, self._rows, hidden)
        if self._columns.cache is not None:
            arguments = self._columns.arguments(self._layer, self._rows, hidden, kwargs)
            self.look.write(layer, hidden, arguments)
        return hidden

    def _at(self, where: str) -> list[Act]:
        return [a for a in self._acts if a.site.layer == self._layer and a.site.where == where]

    def _reads_next(self, what: str) -> bool:
        following = Site(self._layer + 1)
        return any(a.site == following and a.method.reads == what for a in self._acts)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """Look at a kernel's arguments; answer in its place when only they were wanted."""
        scale, rows = float(kwargs["scaling"]), self._rows
        if self.look.ahead:
            return self.look.only(self._layer, rows, query, key, value, mask, scale)
        own = Site(self._layer, "between")
        watched = any(a.site == own and a.method.reads == "own" for a in self._acts)
        if watched or self._reads_next("previous"):
            self.look.along(self._layer, rows, query, key, mask, scale)
        edits = self._beside.edits_at(self._layer)
        if edits is None:
            return None
        seen = self.look.at(self._layer, rows, query, key, mask, scale)
        seen = dataclasses.replace(seen, softcap=kwargs.get("softcap"))
        kernel = partial(call_kernel, module, query, key, value, mask, **kwargs)
        return edits.answer(self._layer, rows, seen, value, kernel, kwargs)

    def lean_output(self, projection: str, output: Tensor) -> Tensor:
        """A projection's output for the rows that were asked, among all rows."""
        return self.look.lean_output(projection, output, self._rows.index.shape[1])

    # Fewer rows -----------------------------------------------------------------------------------

    def _reduce(
        self, act: Act, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor:
        rows = self._rows
        visual = rows.visual.sum(1)
        allowed = torch.tensor(act.left, device=visual.device)
        if act.method.count_kind == "exact" and bool((visual <= allowed).all()):
            return hidden
        state = self._read(act, layer, hidden, kwargs)
        reduction = act.method.reduce(act.number, state, allowed)
        if reduction.soft is not None:
            self._soften(act, reduction)
            return hidden
        if reduction.notes is not None:
            self._notes[id(act.method)] = reduction.notes
        found = rows.reduced(reduction, self._mode or act.method.renumbers)
        if found is None:
            return with_merged(hidden, reduction)
        self._rows, chosen = found
        self._columns.forget()
        self.look.follow(None if reduction.merged is not None else chosen)
        self._notes = {key: _beside(notes, chosen) for key, notes in self._notes.items()}
        if reduction.crop_earlier:
            self._crop_earlier()
        self._earlier, self._embedded = (
            None if values is None else take_rows(values, chosen.clamp(max=values.shape[1] - 1))
            for values in (self._earlier, self._embedded)
        )
        return take_rows(with_merged(hidden, reduction), chosen)

    def _soften(self, act: Act, reduction: Reduction) -> None:
        """Let all rows go on, those that would be dropped more faintly."""
        softening.check(act.method.name, self.decoder)
        self._rows = rows = self._rows.softened(reduction)
        assert rows.soft is not None  # they have just been given it
        assert rows.faint is not None
        kept = rows.visual & ~rows.faint
        mask = SoftMask(act.site.layer, rows.soft.exp() * rows.visual, kept, rows.visual)
        self.soft_masks.append(mask)
        self.look.seen = None
        self._columns.forget()

    def _state(self, hidden: Tensor, parts: Learned | None) -> DecoderState:
        """The rows of this place, as a method sees them."""
        rows = self._rows
        if parts is not None:
            parts.follow(hidden.device)
        return DecoderState(
            hidden=hidden,
            visual=rows.visual,
            valid=rows.valid,
            text=rows.text,
            ordinal=rows.ordinal,
            unit=rows.unit,
            place=rows.place,
            grid=rows.grid,
            given=rows.given,
            depth=len(self.decoder.layers),
            answers=rows.answers,
            embedded=self._embedded,
            faint=rows.faint,
            parts=parts,
        )

    def _read(
        self, act: Act, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> DecoderState:
        """The same with what the method at a site reads."""
        rows, method = self._rows, act.method
        notes = self._notes.get(id(method))
        state = dataclasses.replace(self._state(hidden, act.parts), notes=notes)
        if method.reads == "nothing":
            return state
        if method.reads == "features":
            return dataclasses.replace(state, earlier=self._earlier)
        if method.reads == "next":
            arguments = self._columns.arguments(self._layer, rows, hidden, dict(kwargs))
            asked = method.queries(state)
            self.look.look_ahead(layer, hidden, arguments, asked, method.rotated)
        return dataclasses.replace(state, attention=self.look.seen)

    def _crop_earlier(self) -> None:
        """Cut the caches of the layers so far to the rows that are left.

        Raises:
            UnsupportedInputError: where they cannot be cut.
        """
        for index, held in enumerate(self._held):
            chosen = self._rows.among(held)
            self._beside.crop(index, self._rows, chosen)
            self._columns.crop(index, chosen)
            self._held[index] = self._rows

    # The end --------------------------------------------------------------------------------------

    def finish(self, hidden: Tensor) -> Tensor:
        """The last hidden state at all columns of the call, zeros where a row was dropped."""
        rows, cache = self._rows, self._columns.cache
        self.look.seen = self._earlier = self._embedded = None
        self._columns.forget()
        soft = bool(self.soft_masks)
        cut = soft or not all(held.whole for held in self._held)
        if cache is not None and self._attach is not None and (cut or self._beside.standing):
            layers = tuple(self._columns.held(i, held) for i, held in enumerate(self._held))
            record = self._columns.record(layers, self._all, soft)
            self._attach(cache, dataclasses.replace(record, **self._beside.memory()))
        return rows.spread(hidden, self._all.index.shape[1])


def _beside(notes: Tensor, chosen: Tensor) -> Tensor:
    """[B, R'] what was written beside rows ([B, R]) when some stay; 0 beside merged ones."""
    beyond = (chosen.amax() + 1 - notes.shape[1]).clamp(min=0)
    return torch.nn.functional.pad(notes, (0, int(beyond))).gather(1, chosen)
