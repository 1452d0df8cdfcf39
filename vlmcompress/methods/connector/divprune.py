"""DivPrune: keep the tokens that differ most, a max-min diversity problem (arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import FeatureSpace, TokenCompressor
from vlmcompress.methods.ops.diversity import select
from vlmcompress.methods.parts import Partition


@dataclass(frozen=True)
class DivPrune(TokenCompressor):
    """Greedily maximise the smallest cosine distance between the tokens the LLM receives.

    The count of a fraction is the released code's, Python's `round(keep * n)` (half to even), at
    least 1; one selection covers all segments of a unit. Two things differ from the released code:
    distances are float32 whatever the model's dtype, and a selected token is masked, where the
    original returns an index again once only duplicates are left.
    """

    name: ClassVar[str] = "divprune"
    partition: ClassVar[Partition] = Partition("image", "candidates")
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"
    reads: ClassVar[FeatureSpace] = "llm"

    def nominal(self, n: int, keep: float | int) -> int:
        """`round(keep * n)` for a fraction, at least 1; a count is clamped to n."""
        return min(n, keep if isinstance(keep, int) else max(1, round(keep * n)))

    def order(self, tokens: VisualTokens, keep: float | int) -> Tensor:
        """[b, k] rows in the order in which they are selected."""
        return select(tokens.features, self.budget(tokens, keep))

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep the selected rows, in their original order."""
        return tokens.select(self.order(tokens, keep).sort(-1).values)
