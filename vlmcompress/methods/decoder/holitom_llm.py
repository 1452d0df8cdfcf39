"""HoliTom, the stage inside the LLM: what the last token ignores is merged into what it sees.

https://arxiv.org/abs/2505.21334
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmcompress.core.errors import ConfigTypeError
from vlmcompress.methods.base import Layer
from vlmcompress.methods.decoder.base import (
    DecoderState,
    LayerReducer,
    Reads,
    Reduction,
    best,
    last_row_attention,
)
from vlmcompress.methods.decoder.schedule import Scheduled
from vlmcompress.methods.ops.merging import group_sum

_AT_A_TIME = 2**23  # similarities held at a time


@dataclass(frozen=True)
class HoliTomLLM(Scheduled, LayerReducer):
    """Before layer K, FastV's ranking; each token that goes is merged into the most similar kept.

    Similar by the cosine of their rows; ties go to the earlier row. Kept tokens become the mean of
    their group and keep their position ids. The stage before the LLM, which merges over time, is
    for videos and another matter.

    Attributes:
        layers: K; the released 18, of a Qwen2 of 28 layers.
        faithful: as in the released code, tokens join one after the other, each time by
            (kept + token) / 2: the later one stands in its row, the more it weighs.
    """

    name: ClassVar[str] = "holitom_llm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.21334"
    reads: ClassVar[Reads] = "previous"
    layers: tuple[Layer, ...] = (18 / 28,)
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not isinstance(self.faithful, bool):
            raise ConfigTypeError(f"{self.name}'s faithful is {self.faithful!r}; use a bool.")

    def reduce(self, site: int, state: DecoderState, k: Tensor) -> Reduction:
        """Keep the `k` best, merged with those that go."""
        keep = best(last_row_attention(state), state.visual, k)
        target = most_similar(state.hidden, state.visual & ~keep, state.visual & keep)
        weights = (_in_turn if self.faithful else _evenly)(target, state.visual & ~keep)
        hidden = group_sum(state.hidden, target, target.shape[1], weights)
        return Reduction(keep, hidden.to(state.hidden.dtype))


@torch.no_grad()
def most_similar(rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Which row each one belongs to: [B, L] int64; its own but for the sources.

    Args:
        rows: [B, L, d], compared by their cosine.
        source: [B, L] bool, rows that join another one.
        target: [B, L] bool, rows that they may join; samples without one join nothing.
    """
    b, length, _ = rows.shape
    units = normalize(rows.float(), dim=-1)
    own = torch.arange(length, device=rows.device).expand(b, -1)
    step = max(1, _AT_A_TIME // (b * length))
    found = []
    for start in range(0, length, step):
        similar = units[:, start : start + step] @ units.transpose(1, 2)
        found.append(similar.masked_fill(~target[:, None], -torch.inf).argmax(2))
    return torch.where(source & target.any(1, keepdim=True), torch.cat(found, 1), own)


def _evenly(target: Tensor, moves: Tensor) -> Tensor:
    """[B, L] weights that make every group's sum its mean."""
    size = torch.zeros_like(target).scatter_add(1, target, torch.ones_like(target))
    return 1.0 / size.gather(1, target)


def _in_turn(target: Tensor, moves: Tensor) -> Tensor:
    """[B, L] weights of repeated averaging in the order of rows.

    A row that j others of its group follow is halved once when it joins and once for each of
    these; the kept row is halved by all that join it.
    """
    joins = moves.long()
    total = torch.zeros_like(target).scatter_add(1, target, joins)
    # Rows ordered by group keep their order inside each, so that a running sum counts them.
    order = target.argsort(dim=1, stable=True)
    running = joins.gather(1, order).cumsum(1)
    before = torch.empty_like(running).scatter_(1, order, running)
    end = torch.zeros_like(target).scatter_reduce(1, target, before, "amax", include_self=False)
    follow = end.gather(1, target) - before
    halvings = torch.where(moves, follow + 1, total.gather(1, target))
    return torch.pow(0.5, halvings.double()).float()
