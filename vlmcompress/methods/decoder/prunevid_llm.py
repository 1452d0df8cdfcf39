"""PruneVid, the stage inside the LLM: what the question looks at, in each image alike.

https://arxiv.org/abs/2412.16117
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigTypeError
from vlmcompress.methods.base import Layer
from vlmcompress.methods.decoder.attending import strongest
from vlmcompress.methods.decoder.base import DecoderState, LayerReducer, Reads, Reduction
from vlmcompress.methods.decoder.schedule import Scheduled
from vlmcompress.methods.ops.shares import apportion


@dataclass(frozen=True)
class PruneVidLLM(Scheduled, LayerReducer):
    """Before layer K, rank by the strongest attention that any text row pays in layer K - 1.

    The maximum is taken over heads and over all text behind the images. Every image (or group of
    tokens that earlier stages made of a video) keeps the same share, the paper's 0.4, and caches
    of the layers before are cut to what is left, so that all layers hold the same. Position ids
    are kept. The stage before the LLM, which merges over time, is another matter.

    Attributes:
        layers: K; the released code looks at layer 10 of 32, so 11.
        crop: whether caches of earlier layers are cut, too.
    """

    name: ClassVar[str] = "prunevid_llm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.16117"
    reads: ClassVar[Reads] = "previous"
    layers: tuple[Layer, ...] = (11 / 32,)
    crop: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not isinstance(self.crop, bool):
            raise ConfigTypeError(f"{self.name}'s crop is {self.crop!r}; it must be a bool.")

    def reduce(self, site: int, state: DecoderState, k: Tensor) -> Reduction:
        """Keep the best of every image; the budget is shared in proportion to their tokens."""
        group, sizes = groups_of(state)
        shares = [
            apportion(min(total, sum(row)), row, row)
            for total, row in zip(k.tolist(), sizes.tolist(), strict=True)
        ]
        quota = torch.tensor(shares, device=group.device).view(len(shares), -1)
        keep = best_of_each(self.score(state), group, quota)
        return Reduction(keep | ~state.visual, crop_earlier=self.crop)

    def score(self, state: DecoderState) -> Tensor:
        """[B, L] the strongest attention that text behind the images pays each row."""
        return strongest(state, state.text)


def groups_of(state: DecoderState) -> tuple[Tensor, Tensor]:
    """Images of each sample, counted from 0: [B, L] (-1 for text), and [B, G] their tokens."""
    rows = torch.where(state.visual, state.unit, -1)
    first = torch.where(state.visual, state.unit, rows.amax() + 1).amin(1, keepdim=True)
    group = torch.where(state.visual, rows - first, -1)
    count = max(1, int(group.amax()) + 1)
    sizes = (group[:, None] == torch.arange(count, device=group.device)[:, None]).sum(2)
    return group, sizes


def best_of_each(scores: Tensor, group: Tensor, quota: Tensor) -> Tensor:
    """The highest scores of every group: [B, L] bool; ties go to the earlier row.

    Args:
        scores: [B, L].
        group: [B, L] int64, -1 for rows of none.
        quota: [B, G] how many stay of each.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    sorted_group = group.gather(1, order)
    columns = torch.arange(group.shape[1], device=group.device).expand_as(group)
    new = torch.ones_like(sorted_group, dtype=torch.bool)
    new[:, 1:] = sorted_group[:, 1:] != sorted_group[:, :-1]
    place = columns - torch.where(new, columns, 0).cummax(1).values
    allowed = quota.gather(1, sorted_group.clamp(min=0)).masked_fill(sorted_group < 0, 0)
    return torch.zeros_like(new).scatter(1, order, place < allowed)
