"""Early exit by similarity: layers that change nothing any more are passed over (MuE, LGViT).

https://arxiv.org/abs/2211.11152
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.methods.base import CountKind, Layer
from vlmcompress.methods.decoder.exiting import LayerExit
from vlmcompress.methods.ops.similarity import agreement, check_exit, first_exit


@dataclass(frozen=True)
class EarlyExit(LayerExit):
    """Leave behind the first layer that turns the last row by less than an angle.

    Compared are the row as it came into the layer and as it came out of it; their cosine must reach
    the threshold, in every sample of a batch. Decoding decides token by token. Which threshold is
    right depends on the model: `vlmcompress calibrate early_exit` finds it.

    Attributes:
        threshold: cosine similarity; above 1 nothing leaves early, and nothing is computed for it.
        first: the earliest layer behind which rows may leave.
    """

    name: ClassVar[str] = "early_exit"
    paper: ClassVar[str] = "https://arxiv.org/abs/2211.11152"
    count_kind: ClassVar[CountKind] = "exact"
    looks_at: ClassVar[str] = "features around each layer"
    threshold: float = 0.99
    first: Layer = 0

    def __post_init__(self) -> None:
        """Check the options."""
        check_exit(self.name, self.threshold, self.first)

    @property
    def never(self) -> bool:
        """Above 1."""
        return self.threshold > 1

    def check_depth(self, depth: int) -> None:
        """`first` must be a layer."""
        first_exit(self.first, depth)

    def leaves(self, layer: int, depth: int, before: Tensor, after: Tensor) -> Tensor:
        """Where the row is as before."""
        if layer < first_exit(self.first, depth):
            return torch.zeros(len(before), dtype=torch.bool, device=before.device)
        return agreement(before, after) >= self.threshold
