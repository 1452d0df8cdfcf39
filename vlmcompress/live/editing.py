"""Other attention for some rows of a layer, beside the kernel that the layer was loaded with.

The kernel runs as ever. Then the softmax rows of the queries that are edited are computed in
float32 from the same queries and keys, and what they attend to takes the place of what the kernel
gave these queries; all others keep that to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.families.decoders import Decoder
from vlmcompress.live.columns import Columns
from vlmcompress.live.rows import LayerRecord, Rows, take_rows
from vlmcompress.methods.decoder.attending import packed
from vlmcompress.methods.decoder.attention import DecoderAttention
from vlmcompress.methods.decoder.editing import AttentionEditor, Marks

#: Weights held at a time, all samples and heads together (32 MiB of them).
_AT_A_TIME = 2**23


class Edits:
    """What an editor does in one forward."""

    def __init__(
        self, editor: AttentionEditor, decoder: Decoder, columns: Columns, past: LayerRecord | None
    ) -> None:
        self._editor, self._columns = editor, columns
        depth, width = len(decoder.layers), int(decoder.config.hidden_size)
        self._layers = frozenset(editor.edited_layers(depth, width))
        self._past: tuple[Marks | None, ...] = () if past is None else past.marks
        self._marks: list[Marks | None] = [None] * depth
        self._asked: tuple[Rows, Tensor, Tensor] | None = None

    @property
    def marks(self) -> tuple[Marks | None, ...]:
        """Of every layer's keys, as far as layers have run."""
        return tuple(self._marks)

    def acts(self, layer: int) -> bool:
        """Whether the attention of a layer is edited."""
        return layer in self._layers

    @torch.no_grad()
    def mark(self, layer: int, rows: Rows, hidden: Tensor) -> None:
        """Take note of the rows ([B, R, d]) that come into a layer.

        Raises:
            UnsupportedInputError: when its cache holds rows that were not looked at.
        """
        if not self.acts(layer):
            return
        known = self._known(layer)
        if known is None:
            first = rows.valid.to(torch.uint8).argmax(1, keepdim=True)
            anchor = self._editor.anchor(take_rows(hidden, first)[:, 0])
            none = torch.zeros(len(hidden), 0, dtype=torch.bool, device=hidden.device)
            known = Marks(anchor, none, none)
        found = self._editor.marks(hidden, known.anchor)
        visual, valid = (flags.to(hidden.device) for flags in (rows.visual, rows.valid))
        self._marks[layer] = known.grown(visual, found & valid)

    def _known(self, layer: int) -> Marks | None:
        held = self._columns.past(layer).seen.shape[1]
        known = self._past[layer] if self._past else None
        if known is not None:
            return known.resized(held)
        if held:
            raise UnsupportedInputError(
                f"{self._editor.name} compares rows with the first of the conversation, and the "
                f"cache holds {held} that came in without it; give the image with the first turn, "
                "or start again without the cache."
            )
        return None

    def crop(self, layer: int, rows: Rows, chosen: Tensor) -> None:
        """Follow the cache of a layer that was cut to `rows`, which are `chosen` ([B, R]) of it."""
        marks = self._marks[layer]
        if marks is None:
            return
        held = self._columns.past(layer).seen.shape[1]
        before = torch.arange(held, device=chosen.device).expand(len(chosen), -1)
        keys = torch.cat([before, chosen + held], 1).to(marks.visual.device)
        valid = torch.cat([torch.ones_like(before, dtype=torch.bool), rows.valid], 1)
        self._marks[layer] = marks.taken(keys, valid.to(keys.device))

    def answer(
        self,
        layer: int,
        rows: Rows,
        attention: DecoderAttention,
        value: Tensor,
        kernel: Callable[[], Any],
        given: Mapping[str, Any],
    ) -> Any:
        """What a kernel gives, with the rows that are edited put in.

        Args:
            layer: its number.
            rows: of the layer.
            attention: what the kernel gets.
            value: [B, kv_heads, C, head_dim] likewise.
            kernel: runs it.
            given: its further arguments.

        Returns:
            [B, R, heads, head_dim], and the kernel's own weights or None.

        Raises:
            UnsupportedInputError: for attention that is no softmax of what is known here.
        """
        self._check(given)
        output, weights = kernel()
        marks = self._marks[layer]
        assert marks is not None  # `mark` has run for the layer
        marks = marks.resized(value.shape[2])
        asked, there = (index.to(output.device) for index in self._queries(layer, rows, marks))
        b, heads = attention.q.shape[:2]
        step = max(1, _AT_A_TIME // (b * heads * value.shape[2]))
        for start in range(0, asked.shape[1], step):
            some = slice(start, start + step)
            edited, changed = self._editor.edit(
                attention.over_all(asked[:, some]), marks.visual, marks.marked
            )
            changed = changed & there[:, None, some]
            output = _put(output, asked[:, some], _mixed(edited, value), changed)
        return output, weights

    def _queries(self, layer: int, rows: Rows, marks: Marks) -> tuple[Tensor, Tensor]:
        """[B, r] rows whose attention may be edited, and [B, r] bool, which of them are some."""
        if self._asked is None or self._asked[0] is not rows:
            held = self._columns.past(layer).seen.shape[1]
            earlier = marks.visual[:, :held].any(1, keepdim=True).to(rows.visual.device)
            behind = earlier | (rows.visual.long().cumsum(1) > 0)
            asked = rows.valid & ~rows.visual & behind
            alone = asked.shape[1] == 1  # a step, which need not wait for the device
            found = (torch.zeros_like(rows.index), asked) if alone else packed(asked)
            self._asked = (rows, *found)
        return self._asked[1:]

    def _check(self, given: Mapping[str, Any]) -> None:
        name = self._editor.name
        if given.get("dropout"):
            raise UnsupportedInputError(
                f"{name} puts its own rows in the place of the kernel's, and this model drops "
                f"attention weights at random in training (p = {given['dropout']}); set its "
                "attention_dropout to 0."
            )
        if given.get("s_aux") is not None:
            raise UnsupportedInputError(
                f"{name} computes softmax rows itself, and this model's have a learnt sink beside "
                "the keys; use another method."
            )


def _mixed(weights: Tensor, value: Tensor) -> Tensor:
    """[B, heads, r, head_dim] float32 of weights ([B, heads, r, C]) and grouped values."""
    b, heads, r, keys = weights.shape
    grouped = weights.reshape(b, value.shape[1], -1, r, keys)
    return (grouped @ value.float()[:, :, None]).reshape(b, heads, r, -1)


def _put(output: Tensor, rows: Tensor, mixed: Tensor, changed: Tensor) -> Tensor:
    """A kernel's output with some heads of some rows replaced.

    Args:
        output: [B, R, heads, head_dim].
        rows: [B, r], each one once.
        mixed: [B, heads, r, head_dim].
        changed: [B, heads, r] bool.
    """
    index = rows[..., None, None].expand(-1, -1, *output.shape[2:])
    new = mixed.transpose(1, 2).to(output.dtype)
    own = output.gather(1, index)
    return output.scatter(1, index, torch.where(changed.transpose(1, 2)[..., None], new, own))
