"""HiRED: prune by head-summed [CLS] attention, budgets split over views (arXiv 2408.10945)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError, EvidenceError, UnsupportedInputError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import Layer, Needs, TokenPruner, check_layers
from vlmcompress.methods.ops.shares import apportion
from vlmcompress.methods.ops.topk import top_k
from vlmcompress.methods.parts import Partition


@dataclass(frozen=True)
class HiRED(TokenPruner):
    """Keep the patches with the largest [CLS] attention, summed over heads.

    The count of a fraction is the released code's, `int(n * keep)` (truncated), at least 1. Of an
    image that was cut into tiles, the whole view gets the share `alpha` of the budget. An early
    layer's [CLS] row of the whole view says where content lies: each tile gets budget in proportion
    to how many of the best `1 - alpha` of the whole view's patches lie in its part of the image.

    Where the released code differs (`faithful=True` follows it): it takes contiguous runs of the
    whole view's patches, in raster order, for the parts of the image, which makes them bands; and
    it truncates each tile's budget, so that up to one token per tile is lost. It also prunes all
    images of a batch by the first one's scores, which is never followed.

    Attributes:
        layer: tower layer whose [CLS] row ranks patches.
        budget_layer: tower layer whose [CLS] row says where content lies.
        alpha: share of the budget that the whole view gets.
        faithful: follow the released code.
    """

    name: ClassVar[str] = "hired"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.10945"
    partition: ClassVar[Partition] = Partition("image", "dropped")
    layer: Layer = -2
    budget_layer: Layer = 0
    alpha: float = 0.5
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check layers and share.

        Raises:
            ConfigError: for layers or a share that make no sense.
        """
        check_layers(self.name, (self.layer, self.budget_layer))
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"hired's alpha is {self.alpha!r}; it must be between 0 and 1.")

    def needs(self) -> Needs:
        """Two [CLS] rows."""
        return Needs(cls_attention=(self.layer, self.budget_layer))

    def nominal(self, n: int, keep: float | int) -> int:
        """`int(n * keep)` for a fraction, at least 1; a count is clamped to n."""
        return min(n, keep if isinstance(keep, int) else max(1, int(n * keep)))

    @property
    def ragged(self) -> bool:
        """Budgets that are rounded down view by view lose another number in every image."""
        return self.faithful

    def score(self, tokens: VisualTokens) -> Tensor:
        """[b, n]: sum over heads of the [CLS] row."""
        return self._rows(tokens)[0]

    def _rows(self, tokens: VisualTokens) -> list[Tensor]:
        """[b, n] head sums: of the ranking layer first, of the budget's layer last.

        Raises:
            EvidenceError: when none were captured.
        """
        rows = tokens.evidence.cls_attention
        if not rows:
            raise EvidenceError("hired needs [CLS] attention, and none was captured.")
        return [row.float().sum(1) for row in rows.values()]

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep the best patches of each view, as many as its share of the budget allows.

        Raises:
            ConfigError: when released rounding leaves none.
            UnsupportedInputError: when released bands do not divide.
        """
        tile = None if tokens.tile is None else tokens.tile[tokens.index[0]]
        if tile is None or int(tile.max()) == 0:
            return super().compress(tokens, keep)
        sums, total = self._rows(tokens), self.budget(tokens, keep)
        outliers = tokens.evidence.outliers
        if outliers is None:
            outliers = torch.zeros_like(sums[0], dtype=torch.bool)
        rows = []
        for score, content, last in zip(sums[0], sums[-1], outliers, strict=True):
            budgets = self.budgets(tile, content, total)
            columns = [(tile == view).nonzero()[:, 0] for view in range(len(budgets))]
            if not any(budgets):
                raise ConfigError(
                    f"hired with faithful=True rounds the budget of each view of an image down, so "
                    f"that {total} tokens come down to none; keep more, or use faithful=False."
                )
            best = [
                where[top_k(score[None, where], k, last[None, where])[0]]
                for where, k in zip(columns, budgets, strict=True)
                if k > 0
            ]
            rows.append(torch.cat(best).sort().values)
        # Only truncation makes counts differ between images (`ragged`): the shortest decides.
        shortest = min(len(row) for row in rows)
        return tokens.select(torch.stack([row[:shortest] for row in rows]))

    def budgets(self, tile: Tensor, content: Tensor, total: int) -> list[int]:
        """Tokens kept in each view.

        Args:
            tile: [n] view that each token shows.
            content: [n] early [CLS] attention.
            total: tokens kept of the image.

        Returns:
            One count per view, the whole view first.
        """
        sizes = torch.bincount(tile).tolist()
        whole = min(int(total * self.alpha), sizes[0])
        rest = min(total - whole, sum(sizes[1:]))
        if not self.faithful:
            whole = total - rest  # what tiles cannot take goes to the whole view
        found = self._content_of_tiles(tile, content[tile == 0])
        if self.faithful:
            counts = [int(c / sum(found) * rest) if sum(found) else 0 for c in found]
            return [whole, *(min(c, n) for c, n in zip(counts, sizes[1:], strict=True))]
        return [whole, *apportion(rest, found, sizes[1:])]

    def _content_of_tiles(self, tile: Tensor, content: Tensor) -> list[int]:
        """How many of the best patches of the whole view lie in the part that each tile shows."""
        n, tiles = len(content), int(tile.max())
        marked = int(n * (1 - self.alpha))
        best = torch.zeros(n, dtype=torch.long, device=content.device)
        if marked:
            best[top_k(content[None], marked)[0]] = 1
        if self.faithful:
            return self._bands(best, tiles)
        side, columns = round(n**0.5), _tiles_across(tile)
        place = torch.arange(n, device=content.device)
        down = place.div(side, rounding_mode="floor") * (tiles // columns)
        across = (place % side) * columns
        cell = down.div(side, rounding_mode="floor") * columns
        cell = cell + across.div(side, rounding_mode="floor")
        return torch.bincount(cell, best, minlength=tiles).long().tolist()

    @staticmethod
    def _bands(best: Tensor, tiles: int) -> list[int]:
        """Marked patches ([n]) in each of as many runs of the raster as there are tiles.

        Raises:
            UnsupportedInputError: where patches do not divide.
        """
        if len(best) % tiles:
            raise UnsupportedInputError(
                f"hired with faithful=True takes equal runs of the whole view's patches for the "
                f"tiles, and {len(best)} patches do not divide into {tiles}; use faithful=False."
            )
        return best.view(tiles, -1).sum(1).tolist()


def _tiles_across(tile: Tensor) -> int:
    """Tiles beside each other: how far the numbers rise in the first row of the map of tiles."""
    tiles = tile[tile > 0]
    falls = (tiles.diff() < 0).nonzero()[:, 0]
    return int(tiles[falls[0]] if len(falls) else tiles.max())
