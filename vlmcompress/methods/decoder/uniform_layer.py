"""Tokens dropped evenly over the image inside the LLM, a baseline without a paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.methods.decoder.base import DecoderState, LayerPruner
from vlmcompress.methods.decoder.schedule import Scheduled

_BITS = 12  # images of up to 4096 x 4096 tokens, prompts of up to 16 million


@dataclass(frozen=True)
class UniformLayer(Scheduled, LayerPruner):
    """At each site a subset stays that lies as evenly as possible; it looks at places only.

    Tokens are ranked by the threshold of ordered dithering (Bayer's matrix) at their place: of any
    number of first ones every second row and column comes before those between. So what a later
    site leaves is among what an earlier one left, all images of a prompt lose the same share, and
    the count is exact. Same places of several images go in turn; tokens without a place in a grid,
    such as newlines, are thinned out in the order they stand in.
    """

    name: ClassVar[str] = "uniform_layer"
    repeatable: ClassVar[bool] = True

    def score(self, state: DecoderState) -> Tensor:
        """[B, L] numbers up to 0, lower for what goes first."""
        placed = state.grid.prod(2) > 1
        turn = _spread_out(state.ordinal, 2 * _BITS)
        level = torch.where(placed, threshold(state.place), turn)
        # In float64 the turn decides between equal places, and nowhere else.
        rank: Tensor = level.double() + turn.double() / 4**_BITS
        return -rank


def threshold(place: Tensor) -> Tensor:
    """Rank of places in ordered dithering: [...] int64 below 4 ** 12.

    Args:
        place: [..., 2] rows and columns.
    """
    row, column = place.unbind(-1)
    value = torch.zeros_like(row)
    for level in range(_BITS):
        down, along = (row >> level) & 1, (column >> level) & 1
        value = 4 * value + 2 * (down ^ along) + down
    return value


def _spread_out(number: Tensor, bits: int) -> Tensor:
    """Numbers with their bits in reverse: neighbours come to lie far apart (van der Corput)."""
    value = torch.zeros_like(number)
    for level in range(bits):
        value = 2 * value + ((number >> level) & 1)
    return value
