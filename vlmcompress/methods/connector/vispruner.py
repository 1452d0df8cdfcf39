"""VisPruner: important tokens by [CLS] attention and diverse others (arXiv 2412.01818v3, §3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import (
    FeatureSpace,
    Layer,
    Needs,
    TokenCompressor,
    check_layers,
    check_share,
    only_row,
)
from vlmcompress.methods.ops.diversity import cosine, thin_out
from vlmcompress.methods.ops.topk import descending


@dataclass(frozen=True)
class VisPruner(TokenCompressor):
    """Keep the tokens [CLS] attends to most, and thin out the others by similarity.

    Of the k tokens kept, `int(k * important)` have the largest [CLS] attention (mean over heads).
    The others, in descending attention, lose up to eight tokens a round: every other one is
    compared (cosine of the tower's states) with those between, and the most similar are dropped.

    The released code fails where a round begins with an odd number of tokens, as with 58 of 576;
    here the larger half is the one that is compared. Everything else, the order of the list from
    round to round included, is as released.

    Attributes:
        important: share of the kept tokens that is chosen by attention.
        layer: tower layer whose [CLS] row is read.
    """

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818v3"
    reads: ClassVar[FeatureSpace] = "tower"
    important: float = 0.5
    layer: Layer = -2

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, (self.layer,))
        check_share(self.name, "important", self.important)

    def needs(self) -> Needs:
        """One [CLS] row."""
        return Needs(cls_attention=(self.layer,))

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep important and diverse rows, in their original order."""
        k = self.budget(tokens, keep)
        return tokens if k >= tokens.n else tokens.select(self._rows(tokens, k).sort(1).values)

    def _rows(self, tokens: VisualTokens, k: int) -> Tensor:
        score = only_row(tokens.evidence.cls_attention).float().mean(1)
        order = descending(score)
        important = int(k * self.important)
        diverse = thin_out(cosine(tokens.features.detach()), order[:, important:], k - important)
        return torch.cat([order[:, :important], diverse], 1)
