"""States that methods inside the language model are handed, made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vlmcompress.methods.decoder.base import DecoderAttention, DecoderState


class Maps(DecoderAttention):
    """An attention whose map ([B, heads, L, L]) is given; it stands in the place of the queries."""

    @classmethod
    def of(cls, maps: Tensor) -> Maps:
        """From the map."""
        return cls(maps, maps, 1.0, torch.ones(maps.shape[0], maps.shape[-1], dtype=torch.bool))

    def weights(self, rows: Tensor) -> Tensor:
        """Rows ([B, r]) of the map."""
        index = rows[:, None, :, None].expand(-1, self.q.shape[1], -1, self.q.shape[3])
        return self.q.gather(2, index)


def state_of(
    hidden: Tensor,
    visual: Tensor,
    attention: DecoderAttention | None = None,
    *,
    valid: Tensor | None = None,
    images: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    **others: Any,
) -> DecoderState:
    """The state of a site.

    Args:
        hidden: [B, L, d].
        visual: [B, L] bool.
        attention: what was read.
        valid: [B, L] bool, all where not given.
        images: [B, L] image of each visual row; one for each sample where not given.
        grid: of every image, whose rows lie in raster order; places are 0 where not given.
        others: further attributes.
    """
    valid = torch.ones_like(visual) if valid is None else valid
    samples = torch.arange(len(visual))[:, None].expand_as(visual)
    unit = torch.where(visual, samples if images is None else images, -1)
    ordinal = torch.where(visual, visual.long().cumsum(1) - 1, -1)
    place = torch.zeros(*visual.shape, 2, dtype=torch.int64)
    size = torch.ones_like(place)
    if grid is not None:
        h, w = grid
        where = torch.stack([ordinal % (h * w) // w, ordinal % w], -1)
        place = torch.where(visual[..., None], where, 0)
        size = torch.where(visual[..., None], torch.tensor([h, w]), 1)
    columns = torch.arange(visual.shape[1])
    last = torch.where(visual, columns, -1).amax(1, keepdim=True)
    state = DecoderState(
        hidden=hidden,
        visual=visual,
        valid=valid,
        text=valid & ~visual & (columns > last),
        ordinal=ordinal,
        unit=unit,
        place=place,
        grid=size,
        given=torch.ones_like(visual),
        depth=others.pop("depth", 32),
        attention=attention,
    )
    return dataclasses.replace(state, **others)
