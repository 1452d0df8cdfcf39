"""VScan, the stage inside the LLM: one drop in the middle, by the last token's attention.

https://arxiv.org/abs/2505.22654
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmcompress.core.errors import ConfigTypeError
from vlmcompress.methods.base import Layer
from vlmcompress.methods.decoder.base import (
    DecoderState,
    LayerPruner,
    Positions,
    Reads,
    last_row_attention,
)
from vlmcompress.methods.decoder.schedule import Scheduled


@dataclass(frozen=True)
class VScanLLM(Scheduled, LayerPruner):
    """Before layer K, rank by the row of the last token that layer K is about to compute.

    The row is averaged over heads, softmax over all rows. `vscan` is the stage before the LLM; the
    paper's preset for 64 tokens on average is "vscan:96 | vscan_llm:32". Position ids are counted
    anew behind the site as in the released LLaVA code, which PyramidDrop's was the basis of; that
    of Qwen2.5-VL keeps them, as this library does for M-RoPE.

    Attributes:
        layers: K; the paper's 16 of 32 (LLaVA) and 14 of 28 (Qwen2.5-VL).
        rotary: whether queries and keys are rotated by their positions first. The released code
            for LLaVA does so, that for Qwen2.5-VL does not.
    """

    name: ClassVar[str] = "vscan_llm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.22654"
    reads: ClassVar[Reads] = "next"
    renumbers: ClassVar[Positions] = "contiguous"
    layers: tuple[Layer, ...] = (0.5,)
    rotary: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not isinstance(self.rotary, bool):
            raise ConfigTypeError(f"{self.name}'s rotary is {self.rotary!r}; it must be a bool.")

    @property
    def rotated(self) -> bool:
        """As `rotary` says."""
        return self.rotary

    def score(self, state: DecoderState) -> Tensor:
        """[B, L] attention of the last row."""
        return last_row_attention(state)
