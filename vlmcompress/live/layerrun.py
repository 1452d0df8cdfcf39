"""One forward of a language model whose layers work on fewer and fewer rows.

Each layer is handed the rows that are left, and what runs along them: position embeddings taken at
their columns, and a mask made for them by transformers itself, from the padding of what is left and
the length of that layer's own cache. Where a method acts between a layer's attention and its MLP,
the layer's own forward runs twice, each time with one half passed over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.core.report import SoftMask
from vlmcompress.families.decoders import Decoder
from vlmcompress.live import softening
from vlmcompress.live.columns import Columns
from vlmcompress.live.look import Look
from vlmcompress.live.rows import LayerRecord, Rows, take_rows
from vlmcompress.methods.decoder.base import (
    DecoderState,
    LayerReducer,
    Positions,
    Reduction,
    Site,
)
from vlmcompress.methods.learned import Learned


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
        half: which half of a layer runs; None where it runs whole.
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
            acts: what is done where, in the order of depth.
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
        self._layer = -1
        self._earlier: Tensor | None = None
        self._embedded: Tensor | None = None
        self._between: Tensor | None = None
        self._answer: Any = None
        self._went: list[Rows] = []
        self.lengths: list[tuple[int, int]] = []
        self.soft_masks: list[SoftMask] = []
        self.half: Literal["attention", "mlp"] | None = None

    def owns(self, module: nn.Module) -> bool:
        """Whether a layer, or a part of one, belongs to this forward."""
        return module in self._parts

    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """Visual tokens of each sample that went through each layer's attention."""
        counts = torch.stack([rows.visual.sum(1) for rows in self._went])
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
        for act in self._at("before"):
            hidden = self._reduce(act, layer, hidden, kwargs)
        self._columns.heal(self._layer)
        self._went.append(self._rows)
        if self._reads_next("features"):
            self._earlier = hidden
        arguments = self._columns.arguments(self._layer, self._rows, hidden, kwargs)
        between, length = self._at("between"), hidden.shape[1]
        if between:
            output = self._halves(between, layer, forward, hidden, arguments, kwargs)
        else:
            output = forward(hidden, **arguments)
        self.lengths.append((length, output.shape[1]))
        return output

    def _at(self, where: str) -> list[Act]:
        return [a for a in self._acts if a.site.layer == self._layer and a.site.where == where]

    def _reads_next(self, what: str) -> bool:
        following = Site(self._layer + 1)
        return any(a.site == following and a.method.reads == what for a in self._acts)

    def _halves(
        self,
        acts: Sequence[Act],
        layer: nn.Module,
        forward: Callable[..., Any],
        hidden: Tensor,
        arguments: dict[str, Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        self.half = "attention"
        forward(hidden, halved=True, **arguments)
        assert self._between is not None  # the norm's hook saw to it
        hidden, self._between = self._between, None
        for act in acts:
            hidden = self._reduce(act, layer, hidden, kwargs)
        self.half = "mlp"
        output = forward(hidden, halved=True, **arguments)
        self.half, self._answer = None, None
        return output

    def attention_half(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a layer's attention does while the layer runs in halves."""
        if self.half != "mlp":
            self._answer = forward(*args, **kwargs)
            return self._answer
        nothing = self.nothing(args[0] if args else kwargs["hidden_states"])
        return nothing if isinstance(self._answer, Tensor) else (nothing, None)

    def nothing(self, like: Tensor) -> Tensor:
        """What a part that is passed over adds."""
        return torch.zeros_like(like[:, :1])

    def hold(self, hidden: Tensor) -> Tensor:
        """Take the rows off before the second norm; one goes on, so that shapes fit."""
        self._between = hidden
        return hidden[:, :1]

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
        if self.look.ahead:
            scale = float(kwargs["scaling"])
            return self.look.only(self._layer, self._rows, query, key, value, mask, scale)
        own = Site(self._layer, "between")
        watched = any(a.site == own and a.method.reads == "own" for a in self._acts)
        if watched or self._reads_next("previous"):
            self.look.along(self._layer, self._rows, query, key, mask, float(kwargs["scaling"]))
        return None

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
        state = self._state(act, layer, hidden, kwargs)
        reduction = act.method.reduce(act.number, state, allowed)
        if reduction.soft is not None:
            self._soften(act, reduction)
            return hidden
        found = rows.reduced(reduction, self._mode or act.method.renumbers)
        self.look.seen = None
        if found is None:
            return hidden if reduction.hidden is None else reduction.hidden
        self._rows, chosen = found
        self._columns.forget()
        if reduction.crop_earlier:
            self._crop_earlier()
        self._earlier, self._embedded = (
            None if values is None else take_rows(values, chosen.clamp(max=values.shape[1] - 1))
            for values in (self._earlier, self._embedded)
        )
        return take_rows(_joined(hidden, reduction), chosen)

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

    def _state(
        self, act: Act, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> DecoderState:
        rows, method = self._rows, act.method
        if act.parts is not None:
            act.parts.follow(hidden.device)
        state = DecoderState(
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
            earlier=self._earlier if method.reads == "features" else None,
            answers=rows.answers,
            embedded=self._embedded,
            faint=rows.faint,
            parts=act.parts,
        )
        if method.reads in ("nothing", "features"):
            return state
        if method.reads == "next":
            arguments = self._columns.arguments(self._layer, rows, hidden, dict(kwargs))
            asked = method.queries(state)
            self.look.look_ahead(layer, hidden, arguments, asked, method.rotated)
        return dataclasses.replace(state, attention=self.look.seen)

    def _crop_earlier(self) -> None:
        """Cut the caches of the layers so far to the rows that are left.

        Raises:
            UnsupportedInputError: for a cache of fixed size.
        """
        for index, went in enumerate(self._went):
            layer = None if self._columns.cache is None else self._columns.cache.layers[index]
            if layer is not None:
                if getattr(layer, "is_compileable", False):
                    raise UnsupportedInputError(
                        "A method that cuts the caches of earlier layers cannot do so in a cache "
                        "of fixed size; use the default cache."
                    )
                past = self._columns.past(index).seen.shape[1]
                chosen = self._rows.among(went)
                layer.keys = _cut(layer.keys, chosen, past)
                layer.values = _cut(layer.values, chosen, past)
            self._went[index] = self._rows

    # The end --------------------------------------------------------------------------------------

    def finish(self, hidden: Tensor) -> Tensor:
        """The last hidden state at all columns of the call, zeros where a row was dropped."""
        rows, cache = self._rows, self._columns.cache
        self.look.seen = self._earlier = self._embedded = None
        self._columns.forget()
        soft = bool(self.soft_masks)
        cut = soft or not all(went.whole for went in self._went)
        if cache is not None and self._attach is not None and cut:
            layers = tuple(self._columns.held(i, went) for i, went in enumerate(self._went))
            self._attach(cache, self._columns.record(layers, self._all, soft))
        if rows.whole:
            return hidden
        length = self._all.index.shape[1]
        there = (rows.valid & ~rows.fresh).to(hidden.device)
        target = torch.where(there, rows.index.to(hidden.device), length)
        out = hidden.new_zeros(len(hidden), length + 1, hidden.shape[-1])
        return out.scatter(1, target[..., None].expand_as(hidden), hidden)[:, :-1]


def _joined(hidden: Tensor, reduction: Reduction) -> Tensor:
    """Rows with their new values, merged ones behind them."""
    hidden = hidden if reduction.hidden is None else reduction.hidden
    if reduction.merged is None:
        return hidden
    return torch.cat([hidden, reduction.merged.to(hidden.dtype)], 1)


def _cut(states: Tensor, chosen: Tensor, past: int) -> Tensor:
    """Keys or values ([B, heads, C, d]) of earlier turns and of chosen rows of this call."""
    rows = chosen.to(states.device)[:, None, :, None] + past
    rows = rows.expand(-1, states.shape[1], -1, states.shape[-1])
    return torch.cat([states[:, :, :past], states.gather(2, rows)], 2)
