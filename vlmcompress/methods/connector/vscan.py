"""VScan, its stage in the encoder: local and global [CLS] attention (arXiv 2505.22654, §3.2)."""

from __future__ import annotations

import math
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
)
from vlmcompress.methods.ops.grid import split
from vlmcompress.methods.ops.merging import group_mean, nearest, regrouped
from vlmcompress.methods.ops.topk import descending, top_k
from vlmcompress.methods.parts import Partition


@dataclass(frozen=True)
class VScan(TokenCompressor):
    """Keep the best of each window by one layer, the best of all by another; merge the rest.

    Of the k tokens kept, `int(k * local)` are shared evenly over windows of `window` x `window`
    tokens and have the largest [CLS] attention there in the `shallow` layer; the others have the
    largest in the `deep` layer (mean over heads). Every dropped token is averaged into the kept one
    that is most similar to it after the connector.

    The released code gives each window the same number, rounded down, and so keeps fewer than
    asked for (98 of 100); here windows share evenly and the count is exact. `faithful=True` rounds
    down as released. Windows at the border of a grid that does not divide are smaller. The paper's
    second stage, inside the language model, is not part of this class.

    Attributes:
        local: share of the kept tokens that is chosen window by window.
        window: side of a window, in tokens.
        shallow: tower layer of the windows.
        deep: tower layer of the whole image.
        faithful: whether windows round their share down.
    """

    name: ClassVar[str] = "vscan"
    partition: ClassVar[Partition] = Partition("tile", "kept")
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.22654"
    reads: ClassVar[FeatureSpace] = "llm"
    local: float = 0.5
    window: int = 6
    shallow: Layer = 5 / 24
    deep: Layer = -2
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, (self.shallow, self.deep))
        check_share(self.name, "local", self.local)
        check_count(self.name, "window", self.window)

    def needs(self) -> Needs:
        """Two [CLS] rows."""
        return Needs(cls_attention=(self.shallow, self.deep))

    def tokens_kept(self, segments: Sequence[Segment], keep: float | int) -> int:
        """The common count; with `faithful=True` less what windows round down."""
        k = super().tokens_kept(segments, keep)
        if k >= sum(s.length for s in segments):
            return k
        kept = sum(self._quotas(segments, k)) + k - int(k * self.local)
        if not kept:
            raise ConfigError(
                f"vscan with faithful=True and local={self.local} keeps none of {k} tokens: no "
                "window gets one. Keep more, or use a smaller local."
            )
        return kept

    def _quotas(self, segments: Sequence[Segment], k: int) -> list[int]:
        """Tokens of each window."""
        sizes = torch.bincount(_windows(segments, self.window)).tolist()
        if self.faithful:
            return [min(size, int(k * self.local) // len(sizes)) for size in sizes]
        return split(int(k * self.local), sizes)

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep local and global rows and average the others into them."""
        k = super().tokens_kept(tokens.current_segments, keep)
        if k >= tokens.n:
            return tokens
        kept = self._rows(tokens, k)
        moved = nearest(tokens.features, kept)
        features = group_mean(tokens.features, moved, kept.shape[1], tokens.mass)
        return regrouped(tokens, features, kept, moved)

    @torch.no_grad()
    def _rows(self, tokens: VisualTokens, k: int) -> Tensor:
        """[b, m] rows kept, ascending."""
        rows = list(tokens.evidence.cls_attention.values())
        if not rows:
            raise EvidenceError("No [CLS] attention was captured, by which vscan ranks tokens.")
        shallow, deep = rows[0].float().mean(1), rows[-1].float().mean(1)
        window = _windows(tokens.current_segments, self.window).to(shallow.device)
        quota = torch.tensor(self._quotas(tokens.current_segments, k), device=window.device)
        order = descending(shallow)
        order = order.gather(1, window[order].sort(dim=1, stable=True).indices)
        ordered = window.sort().values
        inside = torch.arange(tokens.n, device=window.device) - torch.searchsorted(ordered, ordered)
        local = order[:, inside < quota[ordered]]
        rest = deep.scatter(1, local, -torch.inf)
        last = k - int(k * self.local)
        return torch.cat([local, top_k(rest, last)], 1).sort(dim=1).values


def _windows(segments: Sequence[Segment], side: int) -> Tensor:
    """[n] number of the window of each token; every segment and frame has windows of its own."""
    found, first = [], 0
    for segment in segments:
        t, h, w = segment.grid
        down, across = math.ceil(h / side), math.ceil(w / side)
        place = torch.arange(h)[:, None] // side * across + torch.arange(w) // side
        frames = torch.arange(t)[:, None, None] * (down * across)
        found.append(first + (frames + place).flatten())
        first += t * down * across
    return torch.cat(found)
