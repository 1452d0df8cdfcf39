"""PiToMe: merge tokens where they crowd, protect the others (arXiv 2405.16148, §3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import (
    FeatureSpace,
    Layer,
    Needs,
    TokenCompressor,
    check_layers,
    check_number,
)
from vlmcompress.methods.connector.tome import Metric, check_metric, metric_of
from vlmcompress.methods.ops.merging import crowded, merge_down


@dataclass(frozen=True)
class PiToMe(TokenCompressor):
    """Energy-based merging of the tower's output, repeated until k tokens are left.

    A token's energy is the mean over all tokens of elu(cosine - margin); it is high where similar
    tokens crowd. To merge r tokens, the 2 r of highest energy are paired by similarity and the
    others protected. A round merges half of the tokens at most, so k below half takes several.

    The paper merges in every block of the tower; this class merges once, after it, where the
    released schedule of margins (0.9 in the first block, falling to 0 with depth) has arrived at 0.
    Means are weighted by how many tokens each row stands for, as the paper says and the released
    code does for timm models; its code for HuggingFace CLIP takes plain means. Rows are put back
    into raster order after every round. `faithful=True` takes plain means and leaves rows in the
    released order (protected ones by descending energy first).

    Attributes:
        margin: of the energy, in [-1, 1].
        metric: what is compared: `features` (as the released code for CLIP does) or `keys`.
        layer: tower layer whose keys are read.
        faithful: whether means and order are those of the released code for CLIP.
    """

    name: ClassVar[str] = "pitome"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.16148"
    reads: ClassVar[FeatureSpace] = "tower"
    margin: float = 0.0
    metric: Metric = "features"
    layer: Layer = -2
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, (self.layer,))
        check_metric(self.name, self.metric)
        check_number(self.name, "margin", self.margin, -1, 1)

    def needs(self) -> Needs:
        """One layer's keys, or nothing."""
        return Needs(keys=(self.layer,)) if self.metric == "keys" else Needs()

    @property
    def raster_order(self) -> bool:
        """The released order is none."""
        return not self.faithful

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Merge until k rows are left."""
        return merge_down(
            tokens,
            metric_of(tokens, self.metric),
            self.budget(tokens, keep),
            partial(crowded, margin=self.margin),
            raster=self.raster_order,
            by_mass=not self.faithful,
        )
