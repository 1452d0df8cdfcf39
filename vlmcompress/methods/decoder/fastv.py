"""FastV: tokens that the last token attends to least are dropped after a few layers.

https://arxiv.org/abs/2403.06764
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmcompress.methods.base import Layer
from vlmcompress.methods.decoder.base import DecoderState, LayerPruner, Reads, last_row_attention
from vlmcompress.methods.decoder.schedule import Scheduled


@dataclass(frozen=True)
class FastV(Scheduled, LayerPruner):
    """Before layer K, rank by the last token's row of layer K - 1, averaged over heads (§4.1).

    Position ids are kept. The paper re-ranks at every decoding step; the released code with a
    cache, like this, prunes the prompt once.

    Attributes:
        layers: K, layers that see all tokens; the paper's 2 of 32.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"
    reads: ClassVar[Reads] = "previous"
    layers: tuple[Layer, ...] = (2 / 32,)

    def score(self, state: DecoderState) -> Tensor:
        """[B, L] attention of the last row."""
        return last_row_attention(state)
