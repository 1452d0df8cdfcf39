"""Small trained compressors for tests of the seam: not in the registry, and nothing but linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import Layer, Needs
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.ops.grid import centres
from vlmcompress.methods.trained import ConnectorShape, LearnedCompressor


class Mixing(Learned):
    """One linear map of rows beside those of some layers."""

    def __init__(self, width: int, out: int, tokens: int | None) -> None:
        super().__init__(method="mixing", width=width, out=out, tokens=tokens)
        self.map = nn.Linear(width, out)


@dataclass(frozen=True)
class Mixed(LearnedCompressor):
    """The mean of nearly equal runs of tokens, mapped by trained weights."""

    name: ClassVar[str] = "mixed"
    levels: tuple[Layer, ...] = ()

    def needs(self) -> Needs:
        return Needs(states=self.levels)

    def _out(self, shape: ConnectorShape) -> int:
        return shape.width

    def parts(self, shape: ConnectorShape) -> Learned:
        width = shape.width * (1 + shape.levels)
        return fresh(lambda: Mixing(width, self._out(shape), shape.tokens), self.seed, self.weights)

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        k = self.budget(tokens, keep)
        source = torch.tensor(centres(tokens.n, k)).expand(len(tokens.features), -1)
        runs = (torch.arange(tokens.n) * k // tokens.n).expand(len(tokens.features), -1)
        return tokens.regroup(self.mixed(tokens, k), source, runs)

    def mixed(self, tokens: VisualTokens, k: int) -> Tensor:
        """[b, k, out] new rows."""
        rows = torch.cat([tokens.features, *tokens.evidence.states.values()], -1).float()
        member = torch.arange(tokens.n) * k // tokens.n == torch.arange(k)[:, None]
        means = member.float() / member.sum(1, keepdim=True) @ rows
        made: Tensor = required(tokens.parts, Mixing, "connector").map(means)
        return made.to(tokens.features.dtype)


@dataclass(frozen=True)
class Instead(Mixed):
    """The same in place of the connector."""

    name: ClassVar[str] = "instead"
    gives: ClassVar[Literal["tower", "llm"]] = "llm"

    def _out(self, shape: ConnectorShape) -> int:
        return shape.out


KINDS: dict[str, Any] = {"mixed": Mixed, "instead": Instead}
