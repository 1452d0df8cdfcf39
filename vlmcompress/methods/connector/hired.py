"""HiRED: prune by head-summed [CLS] attention of a late layer (arXiv 2408.10945, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmcompress.core.tokens import Segment, VisualTokens
from vlmcompress.methods.base import Layer, Needs, TokenPruner, check_layers, only_row


@dataclass(frozen=True)
class HiRED(TokenPruner):
    """Keep the patches with the largest [CLS] attention, summed over heads; one fixed-size view.

    The count of a fraction is the released code's, `int(n * keep)` (truncated), at least 1. The
    split of a budget between a full view and its tiles, which the paper derives from an early
    layer, is not part of this class: every unit keeps its own count. The released code prunes all
    images of a batch alike, by the first one's scores; here each image has its own.

    Attributes:
        layer: tower layer whose [CLS] row is read.
    """

    name: ClassVar[str] = "hired"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.10945"
    layer: Layer = -2

    def __post_init__(self) -> None:
        """Check the layer."""
        check_layers(self.name, (self.layer,))

    def needs(self) -> Needs:
        """One [CLS] row."""
        return Needs(cls_attention=(self.layer,))

    def tokens_kept(self, segments: Sequence[Segment], keep: float | int) -> int:
        """`int(n * keep)` for a fraction, at least 1; a count is clamped to n."""
        n = sum(s.length for s in segments)
        return min(n, keep if isinstance(keep, int) else max(1, int(n * keep)))

    def score(self, tokens: VisualTokens) -> Tensor:
        """[b, n]: sum over heads of the [CLS] row."""
        return only_row(tokens.evidence.cls_attention).float().sum(1)
