"""Trained compressors that make one row of each cell of an image: `CellCompressor`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import Segment, VisualTokens
from vlmcompress.methods.ops.windows import Size, middles, owners
from vlmcompress.methods.trained import LearnedCompressor, cell_grid, rectangle


def whole_map(method: str, tokens: VisualTokens) -> Size:
    """(height, width) of images or tiles of which nothing is missing yet.

    Raises:
        ConfigError: for several rectangles, and when an earlier method dropped or merged tokens.
    """
    if tokens.n != tokens.n_full:
        raise ConfigError(
            f"{method} works on whole maps of tokens, but an earlier method left {tokens.n} of "
            f"{tokens.n_full}; put {method} first."
        )
    return rectangle(method, tokens.segments)


@dataclass(frozen=True)
class CellCompressor(LearnedCompressor):
    """One row for each cell of a grid that is laid over the image or tile.

    Cells are as even as whole tokens allow. The token in the middle of a cell stands for it.
    """

    def tokens_kept(self, segments: Sequence[Segment], keep: float | int) -> int:
        """Cells of `cell_grid`: those asked for where their grid fits the image's shape, or fewer.

        Raises:
            ConfigError: for several rectangles.
        """
        rows, columns = self._cells(rectangle(self.name, segments), segments, keep)
        return rows * columns

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """One row per cell, in raster order.

        Raises:
            ConfigError: for several rectangles, and when an earlier method dropped or merged
                tokens.
            EvidenceError: without trained parts.
        """
        size = whole_map(self.name, tokens)
        cells = self._cells(size, tokens.segments, keep)
        with torch.autocast(tokens.features.device.type, enabled=False):
            made = self.pack(tokens, size, cells).to(tokens.features.dtype)
        source, moved = (
            where(size, cells).to(made.device).expand(len(made), -1) for where in (middles, owners)
        )
        return tokens.regroup(made, source, moved)

    @abstractmethod
    def pack(self, tokens: VisualTokens, size: Size, cells: Size) -> Tensor:
        """The rows of all cells, [b, rows * columns, d] in raster order.

        Args:
            tokens: whole images, [b, h * w, width].
            size: (h, w).
            cells: (rows, columns).

        Raises:
            EvidenceError: without trained parts.
        """

    def _cells(self, size: Size, segments: Sequence[Segment], keep: float | int) -> Size:
        return cell_grid(size, super().tokens_kept(segments, keep))
