"""Random: keep a random subset, the first baseline every method must beat (no paper)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

from vlmcompress.core.errors import ConfigTypeError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import TokenCompressor
from vlmcompress.methods.ops.hashing import hashed


@dataclass(frozen=True)
class Random(TokenCompressor):
    """Keep the tokens whose hash of (seed, place) is smallest.

    Equal (seed, n) keep equal places, whatever the batch, device or dtype; a larger count keeps a
    superset of a smaller one's.

    Attributes:
        seed: any int; None takes the seed of the whole compression, 0 where there is none.
    """

    name: ClassVar[str] = "random"
    stochastic: ClassVar[bool] = True
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the seed's type."""
        if self.seed is None:
            return
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise ConfigTypeError(f"random's seed is {self.seed!r}; it must be an int or None.")
        object.__setattr__(self, "seed", int(self.seed))

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep a random subset, in its original order."""
        places = hashed(self.seed or 0, tokens.n, tokens.features.device).argsort()
        index = places[: self.budget(tokens, keep)].sort().values
        return tokens.select(index.expand(len(tokens.features), -1))
