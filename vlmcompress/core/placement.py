"""Which columns of a prompt stay, and every aligned tensor cut by that one index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmcompress.core.errors import PlaceholderMismatchError

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Placement:
    """Columns of the caller's prompt that the language model sees.

    Attributes:
        index: [B, L'] column of the caller's sequence each short column comes from (0 where not
            valid).
        valid: [B, L'] bool; False marks padding.
        length: L, the caller's length.
        kept: [B, L] bool, caller's columns that survive.
        removed: [B, L] bool, visual tokens that were dropped (trimmed padding does not count).
        side: where shorter rows are padded.
    """

    index: Tensor
    valid: Tensor
    length: int
    kept: Tensor
    removed: Tensor
    side: Side

    @classmethod
    def everything(cls, batch: int, length: int, device: torch.device) -> Placement:
        """The placement of `batch` rows of `length` columns that drops nothing."""
        index = torch.arange(length, device=device).expand(batch, -1)
        stay = torch.ones(batch, length, dtype=torch.bool, device=device)
        return cls(index, stay, length, stay, ~stay, "left")

    @property
    def dropped(self) -> Tensor:
        """[B] int64 visual tokens dropped from each row."""
        return self.removed.sum(1)

    @property
    def short_length(self) -> int:
        """L', the length of the shortened prompt."""
        return self.index.shape[1]

    @property
    def shortened_by(self) -> int:
        """L - L'."""
        return self.length - self.short_length

    def take(self, values: Tensor, fill: float | int | bool) -> Tensor:
        """Shorten `values` ([B, L] or [..., B, L]) in the last dimension; padding gets `fill`."""
        batch = values.shape[-2]
        index = self.index.expand(*values.shape[:-2], -1, -1)
        if batch == 1 != self.index.shape[0]:
            values = values.expand(*values.shape[:-2], self.index.shape[0], -1)
        return values.gather(-1, index).masked_fill(~self.valid, fill)

    def take_square(self, mask: Tensor, fill: float | bool) -> Tensor:
        """Shorten a [B, heads, L, L] attention mask on both sequence axes."""
        rows = self.index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        mask = mask.gather(2, rows)
        columns = self.index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
        return mask.gather(3, columns).masked_fill(~self.valid[:, None, None, :], fill)

    def dropped_before(self) -> Tensor:
        """[B, L'] how many visual tokens before each kept column were dropped."""
        return self.removed.long().cumsum(-1).gather(1, self.index)

    def extend(self, values: Tensor, fill: float | int | bool) -> Tensor:
        """Shorten the first L columns of `values` ([..., B, L + t]) and leave the later ones."""
        first, later = values[..., : self.length], values[..., self.length :]
        return torch.cat([self.take(first, fill), later], dim=-1)

    def grown(self, length: int) -> Placement:
        """This placement with later columns, up to `length`, that all stay."""
        rows, device = self.index.shape[0], self.index.device
        return self.join(Placement.everything(rows, length - self.length, device))

    def join(self, later: Placement) -> Placement:
        """This placement followed by that of the columns after its own."""
        pairs = ((self.valid, later.valid), (self.kept, later.kept), (self.removed, later.removed))
        valid, kept, removed = (torch.cat(pair, 1) for pair in pairs)
        shifted = torch.where(later.valid, later.index + self.length, 0)
        index = torch.cat([self.index, shifted], 1)
        return Placement(index, valid, self.length + later.length, kept, removed, later.side)

    def short_column(self) -> Tensor:
        """[B, L] the short column of each of the caller's columns, -1 where dropped."""
        columns = torch.arange(self.short_length, device=self.index.device).expand_as(self.index)
        out = self.kept.new_full((self.kept.shape[0], self.length + 1), -1, dtype=torch.int64)
        # Padding is written to a spare last column that is cut off again.
        return out.scatter(1, torch.where(self.valid, self.index, self.length), columns)[:, :-1]


def place(
    placeholders: Tensor,
    unit_lengths: Sequence[int],
    kept: Sequence[Tensor],
    *,
    padding: Tensor | None = None,
    side: Side = "right",
) -> Placement:
    """Match kept visual tokens with the prompt's placeholders.

    Args:
        placeholders: [B, L] bool, image placeholders in the prompt; units fill them in row-major
            order.
        unit_lengths: uncompressed tokens of each unit.
        kept: per unit the kept rows, ascending int64.
        padding: [B, L] bool, columns that are padding and need not survive.
        side: where rows that become shorter than others are padded.

    Raises:
        PlaceholderMismatchError: when the counts differ.
    """
    found, expected = int(placeholders.sum()), sum(unit_lengths)
    if found != expected:
        raise PlaceholderMismatchError(
            f"The prompt has {found} image placeholders but the images give {expected} tokens "
            f"({len(unit_lengths)} images of {sorted(set(unit_lengths))} tokens); build both with "
            "one processor call."
        )
    stay = ~placeholders
    stay[placeholders] = _unit_mask(unit_lengths, kept, placeholders.device)
    removed = ~stay
    if padding is not None:
        stay = stay & ~padding
    index, valid = kept_columns(stay, side)
    return Placement(index, valid, placeholders.shape[1], stay, removed, side)


def kept_columns(stay: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """The columns that stay, packed together.

    Args:
        stay: [B, L] bool.
        side: where rows that become shorter than others are padded.

    Returns:
        [B, L'] int64 columns, 0 at padding, and [B, L'] bool, which of them are no padding; L' is
        the longest row's length, at least 1.
    """
    counts = stay.sum(1)
    short = max(int(counts.max()), 1)
    order = (~stay).to(torch.uint8).argsort(dim=1, stable=True)[:, :short]
    columns = torch.arange(short, device=stay.device).expand_as(order)
    if side == "left":
        columns = columns - (short - counts)[:, None]
    valid = (columns >= 0) & (columns < counts[:, None])
    return order.gather(1, columns.clamp(0, short - 1)).masked_fill(~valid, 0), valid


def _unit_mask(lengths: Sequence[int], kept: Sequence[Tensor], device: torch.device) -> Tensor:
    mask = torch.zeros(sum(lengths), dtype=torch.bool, device=device)
    offset = 0
    for length, rows in zip(lengths, kept, strict=True):
        mask[rows.to(device) + offset] = True
        offset += length
    return mask


def edge_padding(mask: Tensor) -> Tensor:
    """[B, L] bool: leading and trailing zeros of a 2-D attention mask (inner zeros are tokens)."""
    seen = mask.bool().long()
    return (seen.cumsum(1) == 0) | (seen.flip(1).cumsum(1).flip(1) == 0)
