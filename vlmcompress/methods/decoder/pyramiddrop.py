"""PyramidDrop: fewer tokens stage by stage, by the attention of the instruction's last token.

https://arxiv.org/abs/2410.17247
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.decoder.attending import packed
from vlmcompress.methods.decoder.base import DecoderState, LayerPruner, Positions, Reads
from vlmcompress.methods.decoder.schedule import Scheduled


@dataclass(frozen=True)
class PyramidDrop(Scheduled, LayerPruner):
    """Before each stage, rank by a row of the attention that its first layer is about to compute.

    The row is that of the instruction's last token, averaged over heads; in training, the mean over
    the last tokens of all instructions of a conversation. Positions are counted anew behind every
    stage. `keep=0.125` at three sites is the published half, quarter and eighth; counts are rounded
    to nearest there, and truncated with `ratios`, as in the released code.

    Attributes:
        ratios: shares of the original tokens left behind each site, in place of `keep`.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.17247"
    reads: ClassVar[Reads] = "next"
    renumbers: ClassVar[Positions] = "contiguous"
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        ratios = self.ratios
        if ratios is None:
            return
        if len(ratios) != len(self.layers):
            raise ConfigError(
                f"{self.name} has {len(ratios)} ratios for {len(self.layers)} layers; give one "
                "ratio per layer."
            )
        falls = all(late <= early for early, late in zip((1.0, *ratios), ratios, strict=False))
        if not falls or ratios[-1] <= 0:
            raise ConfigError(
                f"{self.name}'s ratios are {list(ratios)}; they must lie in (0, 1] and not grow."
            )

    @property
    def own_budget(self) -> bool:
        """With `ratios` or `average_keep`."""
        return self.ratios is not None or super().own_budget

    def counts(self, n: int, keep: float | int | None, depth: int) -> tuple[int, ...]:
        """Geometric, or by the ratios."""
        if self.ratios is None:
            return super().counts(n, keep, depth)
        return tuple(max(1, int(n * ratio)) for ratio in self.ratios)

    def queries(self, state: DecoderState) -> Tensor:
        """[B, r] the last row of every instruction; the first of them again where there are fewer.

        Repeating a row is taken care of in `score`.
        """
        if state.answers is None:
            return state.last
        rows, there = packed(state.answers)
        if not rows.shape[1]:
            return state.last
        return torch.where(there, rows, torch.where(there[:, :1], rows[:, :1], state.last))

    def score(self, state: DecoderState) -> Tensor:
        """[B, L] attention, averaged over heads and the rows that ask."""
        rows = self.queries(state)
        first = torch.ones_like(rows, dtype=torch.bool)
        first[:, 1:] = rows[:, 1:] > rows[:, :-1]
        weights = state.attended().weights(rows).mean(1) * first[..., None]
        return weights.sum(1) / first.sum(1, keepdim=True)
