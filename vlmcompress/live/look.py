"""Looking at the attention of a decoder layer: while it runs, or ahead of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.families.decoders import Decoder
from vlmcompress.live import softening
from vlmcompress.live.columns import Columns
from vlmcompress.live.rows import Rows, take_rows
from vlmcompress.methods.decoder.attention import DecoderAttention


class Look:
    """What was seen of a layer's queries and keys.

    Attributes:
        seen: of the layer looked at last; None when it was forgotten.
    """

    def __init__(self, decoder: Decoder, columns: Columns) -> None:
        self._decoder, self._columns = decoder, columns
        self._asked: Tensor | None = None
        self._writing = False
        self.seen: DecoderAttention | None = None

    @property
    def ahead(self) -> bool:
        """Whether only a part of an attention runs: for a look alone, or for its cache."""
        return self._asked is not None or self._writing

    @torch.no_grad()
    def look_ahead(
        self,
        layer: nn.Module,
        hidden: Tensor,
        arguments: Mapping[str, Any],
        asked: Tensor,
        rotated: bool,
    ) -> None:
        """Queries of some rows and the keys that a layer is about to make, by its own attention.

        Args:
            layer: the layer.
            hidden: [B, R, d] what will come into it.
            arguments: what it will be told.
            asked: [B, r] rows whose queries are wanted.
            rotated: whether position embeddings are applied to both.
        """
        told = {k: v for k, v in arguments.items() if k not in ("past_key_values", "use_cache")}
        if not rotated:
            cos, sin = told["position_embeddings"]
            told["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        normed = layer.get_submodule(self._decoder.first_norm)(hidden)
        self._asked = asked
        try:
            layer.get_submodule(self._decoder.attention)(hidden_states=normed, **told)
        finally:
            self._asked = None

    @torch.no_grad()
    def write(self, layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> None:
        """Let a layer's attention put keys and values of rows into its cache, and no more.

        Args:
            layer: the layer.
            hidden: [B, R, d] rows that would come into it.
            arguments: what it would be told.
        """
        normed = layer.get_submodule(self._decoder.first_norm)(hidden)
        self._writing = True
        try:
            layer.get_submodule(self._decoder.attention)(hidden_states=normed, **arguments)
        finally:
            self._writing = False

    def follow(self, chosen: Tensor | None) -> None:
        """Keep of what was seen the rows that stay ([B, R']); nothing for None."""
        if self.seen is not None:
            self.seen = None if chosen is None else self.seen.taken(chosen)

    def lean_input(self, projection: str, hidden: Tensor) -> Tensor:
        """Rows that a projection need see for the look alone, or for the cache."""
        if self._writing and projection == "v_proj":
            return hidden
        if projection != "q_proj" or self._asked is None:
            return hidden[:, :1]
        return take_rows(hidden, self._asked)

    def lean_output(self, projection: str, output: Tensor, length: int) -> Tensor:
        """The same as [B, length, ...], with nothing in the other rows."""
        if self._writing and projection == "q_proj":
            return output.expand(-1, length, -1)
        if projection == "o_proj" or self._asked is None:
            return output
        if projection == "v_proj":
            return output.expand(-1, length, -1)
        place = self._asked[..., None].expand_as(output)
        return output.new_zeros(len(output), length, output.shape[-1]).scatter(1, place, output)

    def only(
        self, layer: int, rows: Rows, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float
    ) -> Any:
        """Look at what a kernel would have got, and answer in its place."""
        b, heads, length, _ = q.shape
        nothing = v.new_zeros(1, 1, 1, 1).expand(b, length, heads, v.shape[-1]), None
        if self._writing:
            return nothing
        held = self._columns.past(layer).seen.shape[1]
        if held:
            k = torch.cat([self._columns.cache.layers[layer].keys[:, :, :held], k], 2)
        self.along(layer, rows, q, k, mask, scale)
        return nothing

    def along(self, layer: int, rows: Rows, q: Tensor, k: Tensor, mask: Any, scale: float) -> None:
        """Look at what a kernel gets."""
        self.seen = self.at(layer, rows, q.detach(), k.detach(), mask, scale)

    def at(
        self, layer: int, rows: Rows, q: Tensor, k: Tensor, mask: Any, scale: float
    ) -> DecoderAttention:
        """What a kernel gets, for softmax rows of its queries."""
        past, squares = self._columns.past(layer), isinstance(mask, Tensor) and mask.ndim == 4
        return DecoderAttention(
            q=q,
            k=k,
            scale=scale,
            seen=torch.cat([past.seen, rows.valid], 1),
            past=past.seen.shape[1],
            # Looking ahead, keys beyond those of this call are not there yet.
            mask=mask[..., : k.shape[2]] if self._columns.square and squares else None,
            bias=softening.of_keys(rows, past.seen.shape[1]),
        )
