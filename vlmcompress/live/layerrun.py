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

from vlmcompress.core.errors import CacheMismatchError, UnsupportedInputError
from vlmcompress.families.decoders import Decoder
from vlmcompress.live.rows import Held, LayerRecord, Rows
from vlmcompress.methods.decoder.base import (
    DecoderAttention,
    DecoderState,
    LayerReducer,
    Positions,
    Reduction,
    Site,
)


@dataclass(frozen=True)
class Act:
    """One site of one stage.

    Attributes:
        site: where.
        method: what acts there.
        number: of the site among the method's.
        left: per sample, how many visual tokens it may leave.
    """

    site: Site
    method: LayerReducer
    number: int
    left: tuple[int, ...]


class LayerRun:
    """The state of one forward.

    Attributes:
        decoder: the language model.
        half: which half of a layer runs, or that its queries and keys are computed ahead of it;
            None where it runs whole.
        lengths: rows that went through each layer's attention and through its MLP.
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
        gathers_masks: bool = False,
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
            gathers_masks: whether masks are cut out of the model's own, which see more than what
                lies behind.
            attach: called with the cache and what it holds, once the forward is done.
        """
        self.decoder, self._acts, self._mode = decoder, acts, mode
        self._rows, self._length = rows, rows.index.shape[1]
        self._mask2d, self._past, self._gathers = mask, past, gathers_masks
        self._attach = attach
        self._parts = parts
        self._layer = -1
        self._cache: Any = None
        self._before = 0
        self._held: dict[int, Held] = {}
        self._made: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self._captured: DecoderAttention | None = None
        self._earlier: Tensor | None = None
        self._embedded: Tensor | None = None
        self._asked: Tensor | None = None
        self._kept_hidden: Tensor | None = None
        self._answer: Any = None
        self._went: list[Rows] = []
        self.lengths: list[tuple[int, int]] = []
        self.half: Literal["ahead", "attention", "mlp"] | None = None

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
        copies = len(self._went[0].visual) // batch
        counts = self._went[0].visual[::copies].sum(1)
        before = (counts.cumsum(0) - counts)[:, None]
        return tuple(
            torch.where(
                rows.visual[::copies] & ~rows.fresh[::copies], before + rows.ordinal[::copies], -1
            )
            for rows in self._went
        )

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
            self._begin(hidden, kwargs)
        for act in self._at("before"):
            hidden = self._reduce(act, layer, hidden, kwargs)
        self._hold()
        self._went.append(self._rows)
        arguments = self._arguments(hidden, kwargs)
        if self._reads_next("features"):
            self._earlier = hidden
        between, length = self._at("between"), hidden.shape[1]
        if between:
            output = self._halves(between, layer, forward, hidden, arguments, kwargs)
        else:
            output = forward(hidden, **arguments)
        self.lengths.append((length, output.shape[1]))
        return output

    def _begin(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
        self._cache = kwargs.get("past_key_values")
        held = 0 if self._cache is None else int(self._cache.get_seq_length())
        self._before = held if self._past is None else self._past.columns(held)
        if self._past is not None and self._before < self._past.settled:
            raise CacheMismatchError(
                f"The cache holds {self._before} columns of the conversation, which has its images "
                f"in the first {self._past.settled}; it was cropped. Start again without it."
            )
        if any(act.method.reads_embedded for act in self._acts):
            self._embedded = hidden

    def _at(self, where: str) -> list[Act]:
        return [a for a in self._acts if a.site.layer == self._layer and a.site.where == where]

    def _reads_next(self, what: str) -> bool:
        following = Site(self._layer + 1)
        return any(a.site == following and a.method.reads == what for a in self._acts)

    def _watched(self) -> bool:
        """Whether somebody wants to see the attention of the layer that runs."""
        own = Site(self._layer, "between")
        wanted = any(a.site == own and a.method.reads == "own" for a in self._acts)
        return wanted or self._reads_next("previous")

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
        assert self._kept_hidden is not None  # the norm's hook saw to it
        hidden, self._kept_hidden = self._kept_hidden, None
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
        self._kept_hidden = hidden
        return hidden[:, :1]

    # Fewer rows -----------------------------------------------------------------------------------

    def _reduce(
        self, act: Act, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor:
        rows = self._rows
        visual = rows.visual.sum(1)
        allowed = torch.tensor(act.left, device=visual.device)
        if act.method.count_kind == "exact" and bool((visual <= allowed).all()):
            return hidden
        state = self._state(act.method, layer, hidden, kwargs)
        reduction = act.method.reduce(act.number, state, allowed)
        found = rows.reduced(reduction, self._mode or act.method.renumbers)
        self._captured = None
        if found is None:
            return hidden if reduction.hidden is None else reduction.hidden
        self._rows, chosen = found
        self._made.clear()
        if reduction.crop_earlier:
            self._crop_earlier(chosen)
        self._earlier, self._embedded = (
            None if values is None else _take(values, chosen.clamp(max=values.shape[1] - 1))
            for values in (self._earlier, self._embedded)
        )
        return _take(self._joined(hidden, reduction), chosen)

    @staticmethod
    def _joined(hidden: Tensor, reduction: Reduction) -> Tensor:
        hidden = hidden if reduction.hidden is None else reduction.hidden
        if reduction.merged is None:
            return hidden
        return torch.cat([hidden, reduction.merged.to(hidden.dtype)], 1)

    def _state(
        self, method: LayerReducer, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> DecoderState:
        rows = self._rows
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
        )
        if method.reads in ("nothing", "features"):
            return state
        if method.reads == "next":
            self._look_ahead(layer, hidden, kwargs, method.queries(state), method.rotated)
        return dataclasses.replace(state, attention=self._captured)

    @torch.no_grad()
    def _look_ahead(
        self,
        layer: nn.Module,
        hidden: Tensor,
        kwargs: Mapping[str, Any],
        asked: Tensor,
        rotated: bool,
    ) -> None:
        """Queries of some rows and the keys that a layer is about to make, by its own attention."""
        arguments = self._arguments(hidden, dict(kwargs))
        arguments = {
            k: v for k, v in arguments.items() if k not in ("past_key_values", "use_cache")
        }
        if not rotated:
            cos, sin = arguments["position_embeddings"]
            arguments["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        self.half, self._asked = "ahead", asked
        normed = layer.get_submodule(self.decoder.first_norm)(hidden)
        layer.get_submodule(self.decoder.attention)(hidden_states=normed, **arguments)
        self.half, self._asked = None, None

    def lean_input(self, projection: str, hidden: Tensor) -> Tensor:
        """Rows that a projection need see when a layer is looked at ahead."""
        if projection != "q_proj":
            return hidden[:, :1]
        assert self._asked is not None  # set while looking ahead
        return _take(hidden, self._asked)

    def lean_output(self, projection: str, output: Tensor) -> Tensor:
        """The same as [B, R, ...], with nothing in the other rows."""
        if projection == "o_proj":
            return output
        b, r = self._rows.index.shape
        if projection == "v_proj":
            return output.expand(b, r, -1)
        assert self._asked is not None  # set while looking ahead
        place = self._asked[..., None].expand_as(output)
        return output.new_zeros(b, r, output.shape[-1]).scatter(1, place, output)

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
        if self.half == "ahead":
            self._captured = self._seen(query, self._with_past(key), mask, kwargs)
            b, heads, rows, _ = query.shape
            return value.new_zeros(1, 1, 1, 1).expand(b, rows, heads, value.shape[-1]), None
        if self._watched():
            self._captured = self._seen(query, key, mask, kwargs)
        return None

    def _with_past(self, key: Tensor) -> Tensor:
        """Keys with those of earlier turns before them."""
        held = self._past_of(self._layer).seen.shape[1]
        if held == 0:
            return key
        return torch.cat([self._cache.layers[self._layer].keys[:, :, :held], key], 2)

    def _seen(
        self, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]
    ) -> DecoderAttention:
        past, squares = self._past_of(self._layer), isinstance(mask, Tensor) and mask.ndim == 4
        return DecoderAttention(
            q=query.detach(),
            k=key.detach(),
            scale=float(kwargs["scaling"]),
            seen=torch.cat([past.seen, self._rows.valid], 1),
            past=past.seen.shape[1],
            # Looking ahead, keys beyond those of this call are not there yet.
            mask=mask[..., : key.shape[2]] if self._gathers and squares else None,
        )

    def _crop_earlier(self, chosen: Tensor) -> None:
        """Cut the caches of the layers so far to the rows that are left.

        Raises:
            UnsupportedInputError: for a cache of fixed size.
        """
        for index in range(self._layer):
            layer = None if self._cache is None else self._cache.layers[index]
            if layer is not None:
                if getattr(layer, "is_compileable", False):
                    raise UnsupportedInputError(
                        "A method that cuts the caches of earlier layers cannot do so in a cache "
                        "of fixed size; use the default cache."
                    )
                past = self._past_of(index).seen.shape[1]
                layer.keys = _cut(layer.keys, chosen, past)
                layer.values = _cut(layer.values, chosen, past)
            self._held[index] = self._held_by(index)

    # What runs along the rows -------------------------------------------------------------------

    def _past_of(self, layer: int) -> Held:
        """What a layer's cache held before this call."""
        if self._past is None:
            return Held(self._columns(0, self._before), True)
        held, later = self._past.layers[layer], self._before - self._past.length
        if later < 0:  # the prompt was followed by a draft that was rejected
            return held.shrunk(-later)
        return held.grown(self._columns(self._past.length, self._before), True)

    def _columns(self, start: int, stop: int) -> Tensor:
        """[B, stop - start] bool, columns of the conversation that are no padding."""
        if self._mask2d is not None:
            return self._mask2d[:, start:stop].bool()
        return torch.ones(
            len(self._rows.valid), stop - start, dtype=torch.bool, device=self._rows.valid.device
        )

    def _held_by(self, layer: int) -> Held:
        rows, gone = self._rows, None
        if rows.renumbered:
            # Positions are counted back by what lies between the last column and where it is now.
            gone = (rows.index[:, -1] - rows.where[:, -1]).clamp(min=0)
        return self._past_of(layer).grown(rows.valid, rows.full, gone, rows.whole)

    def _hold(self) -> None:
        self._held[self._layer] = self._held_by(self._layer)
        self._heal()

    def _heal(self) -> None:
        """Drop what a rejected draft left behind; `crop` counts in columns of the first layer.

        Raises:
            CacheMismatchError: when a layer holds fewer keys than it should.
        """
        if self._cache is None or self._past is None or self._layer >= len(self._cache.layers):
            return
        layer = self._cache.layers[self._layer]
        held, known = layer.get_seq_length(), self._past_of(self._layer).seen.shape[1]
        if not isinstance(held, int) or held == known:
            return
        if held < known:
            raise CacheMismatchError(
                f"Layer {self._layer} of the cache holds {held} keys and should hold {known}; it "
                "was cropped. Start again without it."
            )
        layer.crop(known)

    def _arguments(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a layer is told, for the rows that are left."""
        past = self._past_of(self._layer)
        if self._rows.whole and past.whole:
            return kwargs
        embeddings, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        key = (id(embeddings), id(mask), id(self._rows), past.seen.shape[1], id(past.gone))
        if key not in self._made:
            self._made[key] = (
                (embeddings, mask, past.gone),  # kept, so that their ids stay theirs
                {
                    "position_embeddings": self._embeddings(hidden, kwargs, past),
                    "attention_mask": self._mask(hidden, mask, past),
                    # Rotation is done by then; FlashAttention would take gaps for packed prompts.
                    "position_ids": None,
                },
            )
        made = self._made[key][1]
        return {k: made.get(k, v) for k, v in kwargs.items()}

    def _embeddings(self, hidden: Tensor, kwargs: Mapping[str, Any], past: Held) -> Any:
        given = kwargs["position_embeddings"]
        if past.gone is not None:
            where = kwargs["position_ids"] - past.gone[:, None]
            given = self.decoder.module.rotary_emb(hidden, position_ids=where)  # type: ignore[operator]
        if self._rows.whole:
            return given
        where = self._rows.where.to(hidden.device)
        return tuple(_columns_of(values, where) for values in given)

    def _mask(self, hidden: Tensor, mask: Any, past: Held) -> Any:
        rows = self._rows
        # Without a mask of the model's own there is no padding but what was put between rows here.
        if mask is None and rows.full and past.full:
            return None
        if self._gathers and isinstance(mask, Tensor) and mask.ndim == 4 and self._past is None:
            return self._padded(_square(mask, rows, self._before))
        seen = torch.cat([past.seen, rows.valid], 1).to(hidden.device)
        return create_causal_mask()(
            config=self.decoder.config,
            inputs_embeds=hidden,
            attention_mask=seen.long(),
            past_key_values=self._cache,
            layer_idx=self._layer,
        )

    def _padded(self, mask: Tensor) -> Tensor:
        """A mask as wide as a cache of fixed size, where the layer has one."""
        layer = None if self._cache is None else self._cache.layers[self._layer]
        if layer is None or not getattr(layer, "is_compileable", False):
            return mask
        beyond = layer.get_max_length() - mask.shape[-1]
        fill = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return torch.nn.functional.pad(mask, (0, beyond), value=fill)

    # The end --------------------------------------------------------------------------------------

    def _record(self, layers: tuple[Held, ...]) -> LayerRecord:
        visual = self._went[0].visual.any(0).nonzero()
        settled = 0 if self._past is None else self._past.settled
        if len(visual):
            settled = self._before + int(visual[-1]) + 1
        return LayerRecord(layers, self._before + self._length, settled)

    def finish(self, hidden: Tensor) -> Tensor:
        """The last hidden state at all columns of the call, zeros where a row was dropped."""
        rows = self._rows
        self._captured = self._earlier = self._embedded = None
        self._made.clear()
        if self._cache is not None and self._attach is not None:
            layers = tuple(self._held[i] for i in range(len(self.decoder.layers)))
            if not all(held.whole for held in layers):
                self._attach(self._cache, self._record(layers))
        if rows.whole:
            return hidden
        there = (rows.valid & ~rows.fresh).to(hidden.device)
        target = torch.where(there, rows.index.to(hidden.device), self._length)
        out = hidden.new_zeros(len(hidden), self._length + 1, hidden.shape[-1])
        return out.scatter(1, target[..., None].expand_as(hidden), hidden)[:, :-1]


def create_causal_mask() -> Callable[..., Any]:
    """What makes a layer's mask; imported with the model, since `import transformers` leaves it."""
    from transformers import masking_utils

    return masking_utils.create_causal_mask


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """Rows ([B, R']) of [B, R, d]."""
    rows = rows.to(values.device)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, rows)


def _columns_of(values: Tensor, where: Tensor) -> Tensor:
    """Columns ([B, R]) of position embeddings ([..., B or 1, L, d])."""
    b, r = where.shape
    values = values.expand(*values.shape[:-3], b, *values.shape[-2:])
    index = where[..., None].expand(*values.shape[:-2], r, values.shape[-1])
    return values.gather(-2, index)


def _square(mask: Tensor, rows: Rows, past: int) -> Tensor:
    """A 4-D mask cut to some rows and columns; what a cache holds beyond them is cut off."""
    index = rows.index.to(mask.device)
    mask = mask.expand(len(index), -1, -1, -1)
    some = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
    columns = (index + past)[:, None, None].expand(*some.shape[:3], -1)
    fill = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    valid = rows.valid.to(mask.device)[:, None, None]
    own = some.gather(3, columns).masked_fill(~valid, fill)
    return torch.cat([some[..., :past], own], 3)


def _cut(states: Tensor, chosen: Tensor, past: int) -> Tensor:
    """Keys or values ([B, heads, C, d]) of earlier turns and of chosen rows of this call."""
    rows = chosen.to(states.device)[:, None, :, None] + past
    rows = rows.expand(-1, states.shape[1], -1, states.shape[-1])
    return torch.cat([states[:, :, :past], states.gather(2, rows)], 2)
