"""Received attention: VTC-CLS (arXiv 2412.05819, §3.2) for towers without [CLS]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import Layer, Needs, TokenPruner, check_layers, head_mean_sum


@dataclass(frozen=True)
class ReceivedAttention(TokenPruner):
    """Keep the patches that all patches together attend to most, head mean summed over layers.

    An extension of this library: the paper reads the [CLS] row, which towers such as SigLIP do not
    have; the mean over all query rows takes its place, at the same layers.

    Attributes:
        layers: tower layers whose received attention is summed.
    """

    name: ClassVar[str] = "received_attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.05819"
    layers: tuple[Layer, ...] = (-4, -3, -2)

    def __post_init__(self) -> None:
        """Check the layers."""
        check_layers(self.name, self.layers)

    def needs(self) -> Needs:
        """Attention received at each layer."""
        return Needs(received_attention=self.layers)

    def score(self, tokens: VisualTokens) -> Tensor:
        """[b, n]: sum over layers of the head-mean attention received."""
        return head_mean_sum(tokens.evidence.received_attention.values())
