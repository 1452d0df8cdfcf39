"""Early exit by similarity: layers that change nothing any more are passed over (MuE, LGViT).

https://arxiv.org/abs/2211.11152
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmcompress.methods.base import CountKind
from vlmcompress.methods.decoder.exiting import LayerExit
from vlmcompress.methods.ops.similarity import LeavesAlike, first_exit


@dataclass(frozen=True)
class EarlyExit(LeavesAlike, LayerExit):
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

    def check_depth(self, depth: int) -> None:
        """`first` must be a layer."""
        first_exit(self.first, depth)
