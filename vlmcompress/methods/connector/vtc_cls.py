"""VTC-CLS: prune by the [CLS] attention of several tower layers (arXiv 2412.05819, §3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import Layer, Needs, TokenPruner, check_layers, head_mean_sum


@dataclass(frozen=True)
class VTCCLS(TokenPruner):
    """Keep the patches with the largest [CLS] attention, head mean summed over layers.

    The paper averages three layers counted back from the penultimate; the released code sums, which
    ranks alike.

    Attributes:
        layers: tower layers whose [CLS] rows are summed.
    """

    name: ClassVar[str] = "vtc_cls"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.05819"
    layers: tuple[Layer, ...] = (-4, -3, -2)

    def __post_init__(self) -> None:
        """Check the layers."""
        check_layers(self.name, self.layers)

    def needs(self) -> Needs:
        """One [CLS] row per layer."""
        return Needs(cls_attention=self.layers)

    def score(self, tokens: VisualTokens) -> Tensor:
        """[b, n]: sum over layers of the head-mean [CLS] row."""
        return head_mean_sum(tokens.evidence.cls_attention.values())
