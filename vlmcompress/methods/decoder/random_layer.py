"""Random tokens dropped inside the LLM: what every schedule must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmcompress.methods.decoder.base import DecoderState, LayerPruner
from vlmcompress.methods.decoder.schedule import Scheduled
from vlmcompress.methods.ops.hashing import hashed_at


@dataclass(frozen=True)
class RandomLayer(Scheduled, LayerPruner):
    """At each site a random subset stays; a token dropped early stays dropped.

    The draw depends on the seed and on which visual token of its sample it is, and on nothing else.

    Attributes:
        seed: of the draw; None takes the configuration's.
    """

    name: ClassVar[str] = "random_layer"
    stochastic: ClassVar[bool] = True
    repeatable: ClassVar[bool] = True
    seed: int | None = None

    def score(self, state: DecoderState) -> Tensor:
        """[B, L] numbers below 0; all sites draw the same, so that one drops what another would."""
        return -hashed_at(self.seed or 0, state.ordinal.clamp(min=0)).double()
