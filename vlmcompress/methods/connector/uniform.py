"""Uniform: keep tokens spread evenly over the image, a baseline without a paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import TokenCompressor
from vlmcompress.methods.ops.grid import split, spread


@dataclass(frozen=True)
class Uniform(TokenCompressor):
    """Keep an exact count of tokens on a grid as regular as the count allows.

    Segments (base view, tiles, frames) share the count in proportion to their tokens;
    `ops.grid.spread` states the rule inside one. After an earlier method, the tokens that are left
    count as one row.
    """

    name: ClassVar[str] = "uniform"

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep evenly spread rows, the same in every unit."""
        segments = tokens.current_segments
        shares = split(self.budget(tokens, keep), [s.length for s in segments])
        places = [
            s.slice.start + place
            for s, k in zip(segments, shares, strict=True)
            if k
            for place in spread(s.grid, k)
        ]
        index = torch.tensor(places, device=tokens.features.device)
        return tokens.select(index.expand(len(tokens.features), -1))
