"""What runs along the rows of a decoder layer: its cache, position embeddings and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmcompress.core.errors import CacheMismatchError, UnsupportedInputError, UnsupportedModelError
from vlmcompress.families.decoders import Decoder
from vlmcompress.live import softening
from vlmcompress.live.rows import Held, LayerRecord, Rows


class Columns:
    """The columns of one call, and those before it that the cache holds.

    Attributes:
        cache: of the call, None without one; known once the first layer has run.
        before: columns of the conversation before the call.
        square: whether masks are cut out of the model's own, in which rows see later ones.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: Rows,
        mask: Tensor | None,
        past: LayerRecord | None,
        square: bool,
    ) -> None:
        self._decoder, self._mask, self._past, self.square = decoder, mask, past, square
        self._batch, self._device = len(rows.valid), rows.valid.device
        self.cache: Any = None
        self.before = 0
        self._grown: dict[int, Held] = {}
        self._held: dict[tuple[int, int], Held] = {}
        self._made: dict[tuple[int, ...], tuple[Any, dict[str, Any]]] = {}

    def begin(self, cache: Any) -> None:
        """Take note of the cache.

        Raises:
            CacheMismatchError: when its images were cropped away.
        """
        self.cache = cache
        held = 0 if cache is None else int(cache.get_seq_length())
        self.before = held if self._past is None else self._past.columns(held)
        if self._past is not None and self.before < self._past.settled:
            raise CacheMismatchError(
                f"The cache holds {self.before} columns of the conversation, which has its images "
                f"in the first {self._past.settled}; it was cropped. Start again without it."
            )

    def past(self, layer: int) -> Held:
        """What a layer's cache held before this call."""
        known = None if self._past is None else self._past.layers[layer]
        if id(known) not in self._grown:
            self._grown[id(known)] = self._as_of_now(known)
        return self._grown[id(known)]

    def _as_of_now(self, known: Held | None) -> Held:
        if known is None or self._past is None:
            return Held(self._seen(0, self.before), True)
        later = self.before - self._past.length
        if later < 0:  # the prompt was followed by a draft that was rejected
            return known.shrunk(-later)
        return known.grown(self._seen(self._past.length, self.before), True)

    def _seen(self, start: int, stop: int) -> Tensor:
        """[B, stop - start] bool, columns of the conversation that are no padding."""
        if self._mask is not None:
            return self._mask[:, start:stop].bool()
        return torch.ones(self._batch, stop - start, dtype=torch.bool, device=self._device)

    def held(self, layer: int, rows: Rows) -> Held:
        """What a layer's cache holds once `rows` have gone through it."""
        past = self.past(layer)
        key = (id(past), id(rows))  # layers that hold the same share one object
        if key not in self._held:
            gone = None
            if rows.renumbered:
                # Positions are counted back by what lies between a column and where it is now.
                gone = (rows.index[:, -1] - rows.where[:, -1]).clamp(min=0)
            self._held[key] = past.grown(rows.valid, rows.full, gone, rows.whole)
        return self._held[key]

    def record(self, layers: tuple[Held, ...], rows: Rows, soft: bool = False) -> LayerRecord:
        """What the cache is to know after the call, whose columns are `rows`."""
        visual = rows.visual.any(0).nonzero()
        settled = 0 if self._past is None else self._past.settled
        if len(visual):
            settled = self.before + int(visual[-1]) + 1
        return LayerRecord(layers, self.before + rows.index.shape[1], settled, soft)

    def heal(self, layer: int) -> None:
        """Drop what a rejected draft left behind in the cache of a layer.

        Raises:
            CacheMismatchError: when it holds fewer keys than it should.
        """
        if self.cache is None or self._past is None:
            return
        cached, known = self.cache.layers[layer], self.past(layer).seen.shape[1]
        held = cached.get_seq_length()
        if not isinstance(held, int) or held == known:
            return
        if held < known:
            raise CacheMismatchError(
                f"Layer {layer} of the cache holds {held} keys and should hold {known}; it was "
                "cropped. Start again without it."
            )
        cached.crop(known - held)

    def crop(self, layer: int, chosen: Tensor) -> None:
        """Cut the cache of a layer to keys of earlier calls and `chosen` ([B, R]) of this one's.

        Raises:
            UnsupportedInputError: for a cache of fixed size.
        """
        cached = None if self.cache is None else self.cache.layers[layer]
        if cached is None:
            return
        if getattr(cached, "is_compileable", False):
            raise UnsupportedInputError(
                "A method that cuts the caches of earlier layers cannot do so in a cache of fixed "
                "size; use the default cache."
            )
        past = self.past(layer).seen.shape[1]
        cached.keys = _cut(cached.keys, chosen, past)
        cached.values = _cut(cached.values, chosen, past)
        if hasattr(cached, "cumulative_length"):  # layers with a window count on their own
            cached.cumulative_length = cached.keys.shape[-2]

    def forget(self, rows: Rows | None = None) -> None:
        """Let go of what was made for some rows; for all of them when none are given."""
        for key, ((*_, made_for), _) in list(self._made.items()):
            if rows is None or made_for is rows:
                del self._made[key]

    def arguments(
        self, layer: int, rows: Rows, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What a layer is told, for the rows that are left.

        Args:
            layer: its number.
            rows: those that are left.
            hidden: [B, R, d], theirs.
            kwargs: what the model hands to every layer, made for all columns.
        """
        past = self.past(layer)
        if rows.whole and past.whole and rows.soft is None:
            return kwargs
        embeddings, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        key = (id(embeddings), id(mask), id(rows), id(past))
        if key not in self._made:
            made = self._made_for(layer, rows, past, hidden, kwargs)
            self._made[key] = ((embeddings, mask, rows), made)  # so that their ids stay theirs
        made = self._made[key][1]
        return {k: made.get(k, v) for k, v in kwargs.items()}

    def _made_for(
        self, layer: int, rows: Rows, past: Held, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        mask, made = kwargs.get("attention_mask"), {}
        if not rows.whole or not past.whole:
            mask = self._square_or_causal(layer, rows, past, hidden, mask)
            # Rotation is done by then; FlashAttention would take gaps for packed prompts.
            made = {
                "position_embeddings": self._embeddings(rows, past, hidden, kwargs),
                "position_ids": None,
            }
        if rows.soft is not None:
            attention = self._decoder.layers[layer].get_submodule(self._decoder.attention)
            causal = getattr(attention, "is_causal", True)
            mask = softening.on(mask, rows, past.seen.shape[1], hidden, causal)
        return {**made, "attention_mask": mask}

    def _embeddings(self, rows: Rows, past: Held, hidden: Tensor, kwargs: Mapping[str, Any]) -> Any:
        given = kwargs["position_embeddings"]
        if past.gone is not None:
            where = kwargs["position_ids"] - past.gone[:, None]
            given = self._decoder.module.rotary_emb(hidden, position_ids=where)  # type: ignore[operator]
        if rows.whole:
            return given
        where = rows.where.to(hidden.device)
        return tuple(_columns_of(values, where) for values in given)

    def _square_or_causal(
        self, layer: int, rows: Rows, past: Held, hidden: Tensor, mask: Any
    ) -> Any:
        # Without a mask of the model's own there is no padding but what was put between rows here.
        if mask is None and rows.full and past.full:
            return None
        if self.square and isinstance(mask, Tensor) and mask.ndim == 4 and self._past is None:
            return self._padded(layer, _square(mask, rows, self.before))
        if self.square and mask is not None and not isinstance(mask, Tensor):
            raise UnsupportedModelError(
                "Rows of this model's prompts see later ones, and the block masks of flex "
                "attention, which say so, cannot be cut to the rows that are left; load the model "
                "with attn_implementation='sdpa'."
            )
        seen = torch.cat([past.seen, rows.valid], 1).to(hidden.device)
        return create_causal_mask()(
            config=self._decoder.config,
            inputs_embeds=hidden,
            attention_mask=seen.long(),
            past_key_values=self.cache,
            layer_idx=layer,
        )

    def _padded(self, layer: int, mask: Tensor) -> Tensor:
        """A mask as wide as a cache of fixed size, where the layer has one."""
        cached = None if self.cache is None else self.cache.layers[layer]
        if cached is None or not getattr(cached, "is_compileable", False):
            return mask
        beyond = cached.get_max_length() - mask.shape[-1]
        return torch.nn.functional.pad(mask, (0, beyond), value=_hides(mask))


def create_causal_mask() -> Callable[..., Any]:
    """What makes a layer's mask; imported with the model, since `import transformers` leaves it."""
    from transformers import masking_utils

    return masking_utils.create_causal_mask


def _hides(mask: Tensor) -> float | bool:
    """What a mask holds where nothing may be seen."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


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
    valid = rows.valid.to(mask.device)[:, None, None]
    own = some.gather(3, columns).masked_fill(~valid, _hides(mask))
    return torch.cat([some[..., :past], own], 3)


def _cut(states: Tensor, chosen: Tensor, past: int) -> Tensor:
    """Keys or values ([B, heads, C, d]) of earlier turns and of chosen rows of this call."""
    rows = chosen.to(states.device)[:, None, :, None] + past
    rows = rows.expand(-1, states.shape[1], -1, states.shape[-1])
    return torch.cat([states[:, :, :past], states.gather(2, rows)], 2)
