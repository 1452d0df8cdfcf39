"""VisionZip: tokens [CLS] attends to, and means of the rest (arXiv 2412.04467, §3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError, EvidenceError
from vlmcompress.core.tokens import Segment, VisualTokens
from vlmcompress.methods.base import (
    FeatureSpace,
    Layer,
    Needs,
    TokenCompressor,
    check_count,
    check_layers,
    check_share,
    only_row,
)
from vlmcompress.methods.ops.merging import group_mean, nearest, regrouped
from vlmcompress.methods.ops.topk import top_k


@dataclass(frozen=True)
class VisionZip(TokenCompressor):
    """Dominant tokens by [CLS] attention; contextual tokens that gather all others.

    Of the k tokens kept, `k - contextual` are dominant: the largest [CLS] attention, summed over
    heads. Contextual tokens are taken at equal steps from the remaining ones; every other remaining
    token goes to the contextual one whose keys (mean over heads) are most similar. A contextual
    token becomes its own state *plus* the mean state of those that came to it, as in the released
    code, so that its norm is about twice a token's; `average=True` takes the mean of all of them.

    Rows come out in raster order, a contextual token at its own place. The released code counts
    [CLS] as one of the k and sends its state to the LLM first, then the dominant, then the
    contextual tokens; `faithful=True` does so too. The row of [CLS] then takes the place of the
    first token that is merged away (its `index`) and has a mass of 0. Of an image that was cut
    into tiles come, as released, the rows of the whole view, the dominant tokens of all tiles in
    the order of their places, the [CLS] rows and the contextual tokens, both tile by tile.

    `contextual=0`, which the released code divides by, keeps the dominant tokens alone.

    Attributes:
        contextual: contextual tokens: a share of k (rounded half up, below k), or a count. The
            default is that of the paper's budgets, 64 = 54 + 10, 128 = 108 + 20, 192 = 162 + 30.
        layer: tower layer whose [CLS] row and keys are read.
        average: whether a contextual token is a mean.
        faithful: whether [CLS] is carried and the released order kept.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"
    reads: ClassVar[FeatureSpace] = "tower"
    contextual: float | int = 10 / 64
    layer: Layer = -2
    average: bool = False
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, (self.layer,))
        if isinstance(self.contextual, float):
            check_share(self.name, "contextual", self.contextual)
        else:
            check_count(self.name, "contextual", self.contextual, least=0)

    def needs(self) -> Needs:
        """One [CLS] row and one layer's keys; the state of [CLS] when it is carried."""
        layer = (self.layer,)
        return Needs(cls_attention=layer, keys=layer, cls_features=self.faithful)

    @property
    def raster_order(self) -> bool:
        """The released order is none."""
        return not self.faithful

    def sections(self, k: int, whole: bool) -> list[int]:
        """The whole view; dominant tokens, [CLS] and contextual tokens of tiles."""
        contextual = self._contextual(k)
        return [-1] * k if whole else [1, *[0] * (k - 1 - contextual), *[2] * contextual]

    def tokens_kept(self, segments: Sequence[Segment], keep: float | int) -> int:
        """The common count; checks that it leaves room for a dominant token."""
        k = super().tokens_kept(segments, keep)
        if k < sum(s.length for s in segments):
            self._contextual(k)
        return k

    def _contextual(self, k: int) -> int:
        if isinstance(self.contextual, float):
            return min(k - 1, int(k * self.contextual + 0.5))
        if self.contextual >= k:
            raise ConfigError(
                f"visionzip keeps {k} tokens of an image and contextual is {self.contextual}; it "
                "must be smaller, so that a dominant token is left. A share, such as 0.15, always "
                "is."
            )
        return self.contextual

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep the dominant tokens and gather the others in contextual ones."""
        k = self.budget(tokens, keep)
        if k >= tokens.n:
            return tokens
        contextual = self._contextual(k)
        patches = k - contextual - int(self.faithful)
        source, moved = self._groups(tokens, patches, contextual)
        features = self._features(tokens, source, moved, contextual)
        if not self.faithful:
            return regrouped(tokens, features, source, moved)
        return self._with_cls(tokens, features, source, moved)

    def _groups(self, tokens: VisualTokens, patches: int, contextual: int) -> tuple[Tensor, Tensor]:
        """Rows that stay ([b, patches + contextual]) and the one each row becomes part of."""
        score = only_row(tokens.evidence.cls_attention).float().sum(1)
        keys = only_row(tokens.evidence.keys).float().mean(2)
        b, n = score.shape
        dominant = top_k(score, patches)
        rest = _others(dominant, n)
        moved = torch.full_like(score, -1, dtype=torch.long)
        number = torch.arange(patches, device=score.device).expand(b, -1)
        moved.scatter_(1, dominant, number)
        if not contextual:
            return dominant, moved
        step = max(1, rest.shape[1] // contextual)
        places = step * torch.arange(contextual, device=score.device).expand(b, -1)
        of_rest = torch.take_along_dim(keys, rest[..., None], 1)
        moved.scatter_(1, rest, patches + nearest(of_rest, places))
        return torch.cat([dominant, rest.gather(1, places)], 1), moved

    def _features(
        self, tokens: VisualTokens, source: Tensor, moved: Tensor, contextual: int
    ) -> Tensor:
        own = torch.take_along_dim(tokens.features, source[..., None], 1)
        if not contextual:
            return own
        k = source.shape[1]
        if self.average:
            return group_mean(tokens.features, moved, k)
        joined = moved.scatter(1, source, -1)
        wide = torch.promote_types(own.dtype, torch.float32)
        return own.to(wide) + group_mean(tokens.features.to(wide), joined, k)

    def _with_cls(
        self, tokens: VisualTokens, features: Tensor, source: Tensor, moved: Tensor
    ) -> VisualTokens:
        """The rows with the state of [CLS] before them."""
        cls = tokens.evidence.cls_features
        if cls is None:
            raise EvidenceError("visionzip with faithful=True needs the state of [CLS].")
        free = _others(source.sort(1).values, tokens.n)[:, :1]
        features = torch.cat([cls[:, None].to(features.dtype), features], 1)
        moved = torch.where(moved < 0, -1, moved + 1)
        return regrouped(tokens, features, torch.cat([free, source], 1), moved, raster=False)


def _others(rows: Tensor, n: int) -> Tensor:
    """[b, n - k] the rows below n that are not among `rows` ([b, k], unique), ascending."""
    taken = torch.zeros(len(rows), n, dtype=torch.long, device=rows.device).scatter_(1, rows, 1)
    return taken.sort(dim=1, stable=True).indices[:, : n - rows.shape[1]]
