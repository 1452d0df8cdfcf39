"""FasterVLM: prune by [CLS] attention in the layer the LLM reads (arXiv 2412.01818v1, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import Layer, Needs, TokenPruner, check_layers, only_row


@dataclass(frozen=True)
class FasterVLM(TokenPruner):
    """Keep the patches [CLS] attends to most, on the mean over heads.

    Attributes:
        layer: tower layer whose [CLS] row is read; -2 produces what LLaVA reads.
    """

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818v1"
    layer: Layer = -2

    def __post_init__(self) -> None:
        """Check the layer."""
        check_layers(self.name, (self.layer,))

    def needs(self) -> Needs:
        """One [CLS] row."""
        return Needs(cls_attention=(self.layer,))

    def score(self, tokens: VisualTokens) -> Tensor:
        """[b, n]: mean over heads of the [CLS] row."""
        return only_row(tokens.evidence.cls_attention).float().mean(1)
