"""PruMerge: outliers of [CLS] attention, each with its neighbours (arXiv 2403.15388, §3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import (
    AdaptiveCompressor,
    FeatureSpace,
    Layer,
    Needs,
    check_count,
    check_layers,
    only_row,
)
from vlmcompress.methods.ops.merging import cosine, regrouped
from vlmcompress.methods.ops.topk import among_best, descending


@dataclass(frozen=True)
class PruMerge(AdaptiveCompressor):
    """Keep the tokens [CLS] attends to most, add their neighbours to them, and one for the rest.

    The [CLS] row is that of the last layer, taken as one head of full width, the scale that of the
    width (released code; the paper writes the usual attention). Of the k tokens kept, k - 1 are
    selected; each becomes its state plus the attention-weighted states of its `neighbours` most
    similar other tokens, whose weights are not normalised; neighbours may be selected ones. The
    last of the k is the attention-weighted sum of all tokens that are not selected; it stands for
    them (`mass`, `assignment`) at the place of the one with the largest weight.

    `keep="auto"` is the paper's adaptive count (eq. 4): as many tokens as there are outliers, above
    the third quartile by 1.5 interquartile ranges, and the one more; without outliers that one
    alone is left. A number keeps exactly that many.

    Rows come out in raster order. `faithful=True` leaves them in the released order (by descending
    attention, the rest last), takes one adaptive count for all images of a group, as the released
    code flattens its batch, and counts a fraction as it does: `int(n * keep) + 1`.

    Attributes:
        neighbours: tokens added to each selected one.
        layer: tower layer whose [CLS] row and keys are read.
        faithful: whether order and counts are those of the released code.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.15388"
    reads: ClassVar[FeatureSpace] = "tower"
    neighbours: int = 32
    layer: Layer = -1
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, (self.layer,))
        check_count(self.name, "neighbours", self.neighbours, least=0)

    def needs(self) -> Needs:
        """One [CLS] row of full width and the keys of its layer."""
        return Needs(wide_cls_attention=(self.layer,), keys=(self.layer,))

    @property
    def raster_order(self) -> bool:
        """The released order is none."""
        return not self.faithful

    def nominal(self, n: int, keep: float | int) -> int:
        """The common count; with `faithful=True`, `int(n * keep) + 1` for a fraction."""
        if not self.faithful or isinstance(keep, int):
            return super().nominal(n, keep)
        return min(n, int(n * keep) + 1)

    def counts(self, tokens: VisualTokens) -> list[int]:
        """Outliers of each unit, and one."""
        return [self._outliers(share, tokens.n) + 1 for share in self._shares(tokens)]

    def _shares(self, tokens: VisualTokens) -> list[float]:
        """The share of outliers of each unit."""
        row = self._attention(tokens)
        pool = row.reshape(1, -1) if self.faithful else row
        found = outlier_share(pool).tolist()
        return found * len(row) if self.faithful else found

    @staticmethod
    def _outliers(share: float, n: int) -> int:
        return int(n * share)

    def adapt(self, tokens: VisualTokens) -> VisualTokens:
        """Keep the outliers, and one token for the rest."""
        return self.compress(tokens, self.counts(tokens)[0])

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Select, add neighbours, and sum up the rest."""
        k = self.budget(tokens, keep)
        if k >= tokens.n:
            return tokens
        return self._merged(tokens, self.select(tokens, k - 1))

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        """[b, k] rows by descending attention; ties go to the lower index."""
        row = self._attention(tokens)
        return descending(row)[:, :k]

    @staticmethod
    def _attention(tokens: VisualTokens) -> Tensor:
        return only_row(tokens.evidence.wide_cls_attention)[:, 0].float()

    def _merged(self, tokens: VisualTokens, selected: Tensor) -> VisualTokens:
        row = self._attention(tokens)
        keys = only_row(tokens.evidence.keys).flatten(2)
        b, k = selected.shape
        taken = torch.zeros_like(row, dtype=torch.bool).scatter_(1, selected, True)
        rest = row.masked_fill(taken, 0)
        weights = torch.cat([self._neighbourhoods(row, keys, selected), rest[:, None]], 1)
        features = _weighted(weights, tokens.features)
        best = row.masked_fill(taken, -torch.inf).argmax(1, keepdim=True)
        moved = torch.full_like(row, k, dtype=torch.long)
        moved.scatter_(1, selected, torch.arange(k, device=row.device).expand(b, k))
        source = torch.cat([selected, best], 1)
        return regrouped(tokens, features, source, moved, raster=self.raster_order)

    def _neighbourhoods(self, row: Tensor, keys: Tensor, selected: Tensor) -> Tensor:
        """[b, k, n] weights of all tokens in each selected one: 1 its own, attention of others."""
        with torch.no_grad():
            similar = cosine(torch.take_along_dim(keys, selected[..., None], 1), keys)
            similar.scatter_(2, selected[..., None], -torch.inf)
            near = among_best(similar, min(self.neighbours, row.shape[1] - 1))
        weights = torch.where(near, row[:, None], 0)
        return weights.scatter(2, selected[..., None], 1)


def outlier_share(values: Tensor) -> Tensor:
    """Share of values above q3 + 1.5 (q3 - q1), row by row: [b] float64 from [b, n].

    Quartiles are interpolated linearly.
    """
    low, high = (values.quantile(q, dim=1, keepdim=True) for q in (0.25, 0.75))
    return (values > high + 1.5 * (high - low)).double().mean(1)


def _weighted(weights: Tensor, features: Tensor) -> Tensor:
    """Sums [b, k, d] of features in float32 or better; one product per unit."""
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        return torch.stack(
            [w.to(wide) @ x.to(wide) for w, x in zip(weights, features, strict=True)]
        )
