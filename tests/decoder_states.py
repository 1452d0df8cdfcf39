"""States that methods inside the language model are handed, made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmcompress.methods.decoder.attention import DecoderAttention
from vlmcompress.methods.decoder.base import DecoderState


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


def random_state(prompts: Sequence[tuple[int, int, int]], seed: int = 0) -> DecoderState:
    """Random rows, with everything that a method may read.

    Args:
        prompts: of each sample, text rows before, visual rows, and text rows behind; the first
            half of the visual rows is one image and the rest another. Padding stands to the left.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    length, b = max(map(sum, prompts)), len(prompts)
    visual, valid = torch.zeros(2, b, length, dtype=torch.bool)
    images = torch.full((b, length), -1)
    for i, (before, n, behind) in enumerate(prompts):
        start = length - n - behind
        visual[i, start : start + n] = True
        valid[i, start - before :] = True
        images[i, start : start + n // 2] = 2 * i
        images[i, start + n // 2 : start + n] = 2 * i + 1
    hidden, earlier, embedded = torch.randn(3, b, length, 8, generator=generator)
    q = 2 * torch.randn(b, 4, length, 6, generator=generator)
    k = 2 * torch.randn(b, 2, length, 6, generator=generator)
    return state_of(
        hidden,
        visual,
        DecoderAttention(q, k, 0.5, valid),
        valid=valid,
        images=images,
        grid=(4, 5),
        earlier=earlier,
        embedded=embedded,
    )


def sample(state: DecoderState, b: int) -> DecoderState:
    """One sample of a state without its padding."""
    columns = state.valid[b]
    attention = state.attended()
    rows = {
        f.name: getattr(state, f.name)[b : b + 1, columns]
        for f in dataclasses.fields(state)
        if isinstance(getattr(state, f.name), Tensor)
    }
    alone = DecoderAttention(
        attention.q[b : b + 1, :, columns],
        attention.k[b : b + 1, :, columns],
        attention.scale,
        attention.seen[b : b + 1, columns],
    )
    return dataclasses.replace(state, **rows, attention=alone)
