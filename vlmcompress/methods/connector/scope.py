"""SCOPE: coverage of all tokens, weighted by [CLS] attention (arXiv 2510.24214, eq. 5-7)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import (
    FeatureSpace,
    Layer,
    Needs,
    TokenCompressor,
    check_layers,
    check_number,
    only_row,
)
from vlmcompress.methods.ops.diversity import cosine, covering


@dataclass(frozen=True)
class Scope(TokenCompressor):
    """Greedily keep the token that covers most of what is not covered yet, if [CLS] looks at it.

    A token is covered by its most similar kept token (cosine of the tower's states; below 0 counts
    as 0). The gain of a token, what it adds to the coverage of all, is multiplied by its [CLS]
    attention (sum over heads) to the power `alpha`.

    The released code divides a budget over the views of an image (`int(k / views)`); here a budget
    is that of the image. Its variant that adds the two terms is not included.

    Attributes:
        alpha: exponent of the attention; 0 leaves coverage alone.
        layer: tower layer whose [CLS] row is read.
    """

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"
    reads: ClassVar[FeatureSpace] = "tower"
    alpha: float = 1.0
    layer: Layer = -2

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, (self.layer,))
        check_number(self.name, "alpha", self.alpha, 0, math.inf)

    def needs(self) -> Needs:
        """One [CLS] row."""
        return Needs(cls_attention=(self.layer,))

    def order(self, tokens: VisualTokens, keep: float | int) -> Tensor:
        """[b, k] rows in the order in which they are selected."""
        attention = only_row(tokens.evidence.cls_attention).float().sum(1)
        similar = cosine(tokens.features.detach())
        return covering(similar, attention**self.alpha, self.budget(tokens, keep))

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep the selected rows, in their original order."""
        return tokens.select(self.order(tokens, keep).sort(1).values)
