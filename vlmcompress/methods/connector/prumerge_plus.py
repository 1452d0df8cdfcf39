"""PruMerge+: PruMerge with tokens from a regular grid (arXiv 2403.15388, §3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import check_count
from vlmcompress.methods.connector.prumerge import PruMerge, outlier_share
from vlmcompress.methods.ops.grid import centres
from vlmcompress.methods.ops.topk import ranks


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge whose selection is a quarter outliers and three quarters a regular grid.

    `keep="auto"` is the released rule. With the share s of outliers, the `int(n s)` largest are
    selected, and every `int(int(1 / s) / 3)`-th token in raster order that is not among them; the
    one for the rest comes on top. How many that are depends on the overlap, so the count is known
    only from the image. Without outliers (where the released code divides by zero), s is taken as
    1 / n.

    A number keeps exactly that many: of the k - 1 selected a quarter by attention, the others from
    an evenly spaced grid, filled up by attention where the two overlap. (The released code has no
    such budget. The fixed ones of the literature, another repository's, are approximate and
    depend on the image; `top` and `stride` give them with `keep="auto"`: 13 and 11 for about 64
    tokens of 576, 40 and 6 for 128, 95 and 3 for 256.)

    `faithful=True` leaves rows in the released order and, with `keep="auto"`, leaves the last token
    out of the grid, as the released code does. Shares are those of each image in both modes: the
    released rule fails on a batch.

    Attributes:
        top: tokens by attention under `keep="auto"`, in place of the number of outliers.
        stride: of the grid under `keep="auto"`.
    """

    name: ClassVar[str] = "prumerge_plus"
    top: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if (self.top is None) != (self.stride is None):
            raise ConfigError(
                f"prumerge_plus has top={self.top!r} and stride={self.stride!r}; give both, or "
                "neither for the adaptive rule."
            )
        if self.top is not None:
            check_count(self.name, "top", self.top)
            check_count(self.name, "stride", self.stride)

    def _shares(self, tokens: VisualTokens) -> list[float]:
        return outlier_share(self._attention(tokens)).tolist()

    def counts(self, tokens: VisualTokens) -> list[int]:
        """Selected tokens of each unit, and one."""
        return [int(rows.sum()) + 1 for rows in self._chosen(tokens)]

    def _chosen(self, tokens: VisualTokens) -> Tensor:
        """[b, n] bool, what `keep="auto"` selects."""
        rank = ranks(self._attention(tokens))
        place = torch.arange(tokens.n, device=rank.device)
        rules = [self._rule(share, tokens.n) for share in self._shares(tokens)]
        top, stride = torch.tensor(rules, device=rank.device).T[..., None]
        grid = place % stride == 0
        if self.faithful:
            grid &= place < tokens.n - 1
        chosen: Tensor = (rank < top) | grid
        return chosen

    def _rule(self, share: float, n: int) -> tuple[int, int]:
        """Tokens by attention and stride of the grid."""
        if self.top is not None and self.stride is not None:
            return self.top, self.stride
        share = max(share, 1 / n)
        return int(n * share), max(1, int(int(1 / share) / 3))

    def adapt(self, tokens: VisualTokens) -> VisualTokens:
        """Keep what the released rule selects, and one token for the rest."""
        chosen, rank = self._chosen(tokens), ranks(self._attention(tokens))
        k = int(chosen[0].sum())
        if k + 1 >= tokens.n:
            return tokens
        tops = [self._rule(share, tokens.n)[0] for share in self._shares(tokens)]
        by_attention = rank < torch.tensor(tops, device=rank.device)[:, None]
        place = torch.arange(tokens.n, device=rank.device)
        # By attention first, then the grid in raster order, then what is not chosen.
        key = torch.where(by_attention, rank, tokens.n + place)
        key = torch.where(chosen, key, 2 * tokens.n + place)
        return self._merged(tokens, key.argsort(1)[:, :k])

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        """[b, k] rows: a quarter by attention, then the grid, then others by attention."""
        rank = ranks(self._attention(tokens))
        n, top = tokens.n, (k + 2) // 4
        grid = torch.zeros(n, dtype=torch.bool)
        grid[centres(n, k - top)] = True
        grid = grid.to(rank.device)
        place = torch.arange(n, device=rank.device)
        key = torch.where(grid, n + place, 2 * n + rank)
        key = torch.where(rank < top, rank, key)
        return key.argsort(1)[:, :k]
