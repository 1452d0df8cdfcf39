"""ToMe: merge the most similar tokens, half of them a round (arXiv 2210.09461, §3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import (
    FeatureSpace,
    Layer,
    Needs,
    TokenCompressor,
    check_layers,
    only_row,
)
from vlmcompress.methods.ops.merging import bipartite, merge_down

Metric = Literal["keys", "features"]


@dataclass(frozen=True)
class ToMe(TokenCompressor):
    """Bipartite soft matching on the tower's output, repeated until k tokens are left.

    Tokens at even places are compared with those at odd places; the most similar pairs are merged
    into means weighted by how many tokens each stands for. A round merges half of the tokens at
    most, so k below half takes several; what is compared is averaged along.

    The paper merges a few tokens in every block of the tower; this class merges once, after it.
    Rows are put back into raster order (the place of the odd token) after every round;
    `faithful=True` leaves them in the released order, which descends in similarity.

    Attributes:
        metric: what is compared: `keys` (mean over heads, the paper's choice) or `features`.
        layer: tower layer whose keys are read.
        faithful: whether rows stay in the released order.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.09461"
    reads: ClassVar[FeatureSpace] = "tower"
    metric: Metric = "keys"
    layer: Layer = -2
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, (self.layer,))
        check_metric(self.name, self.metric)

    def needs(self) -> Needs:
        """One layer's keys, or nothing."""
        return Needs(keys=(self.layer,)) if self.metric == "keys" else Needs()

    @property
    def raster_order(self) -> bool:
        """The released order is none."""
        return not self.faithful

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Merge until k rows are left."""
        k = self.budget(tokens, keep)
        metric = metric_of(tokens, self.metric)
        return merge_down(tokens, metric, k, bipartite, raster=self.raster_order)


def check_metric(method: str, metric: str) -> None:
    """Check what a merging method compares.

    Raises:
        ConfigError: for anything but `keys` and `features`.
    """
    if metric not in ("keys", "features"):
        raise ConfigError(f"{method}'s metric is {metric!r}; allowed are 'keys' and 'features'.")


def metric_of(tokens: VisualTokens, metric: Metric) -> Tensor | None:
    """[b, n, e] keys averaged over heads; None for the features themselves."""
    if metric == "features":
        return None
    return only_row(tokens.evidence.keys).float().mean(2)
