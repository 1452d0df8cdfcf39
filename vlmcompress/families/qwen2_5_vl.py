"""Qwen2.5-VL: as Qwen2-VL, but most of the tower's blocks look at windows of the image only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.families.base import Grid, GridFamily, Layout, Reduce
from vlmcompress.families.towers import PackedTower


class WindowedFamily(GridFamily):
    """A tower that works window by window, and on whole images in a few of its blocks.

    Inside it the patches of an image stand window by window, its tokens behind it in raster order.
    """

    def whole_layers(self, base: nn.Module) -> frozenset[int]:
        """Those whose attention is over whole images."""
        layers: Sequence[int] = self.tower_module(base).fullatt_block_indexes  # type: ignore[assignment]
        return frozenset(layers)

    def by_token(
        self,
        base: nn.Module,
        call: Mapping[str, Any],
        captured: Sequence[Tensor],
        units: Sequence[int],
        layout: Layout,
        reduce: Reduce,
    ) -> Tensor:
        """Values of tokens, brought from the order of the windows into that of the image."""
        values = super().by_token(base, call, captured, units, layout, reduce)
        _, h, w = layout.segments[0].grid
        tower: Any = self.tower_module(base)
        side = tower.window_size // self.merge // tower.patch_size
        return values[..., by_window((h, w), side).argsort().to(values.device)]


def by_window(grid: Grid, side: int) -> Tensor:
    """[h * w] int64, the tokens of an image window by window, each in raster order.

    Args:
        grid: (h, w) of the image in tokens.
        side: of a window in tokens; those at the right and the lower edge may be smaller.
    """
    h, w = grid
    rows, columns = torch.arange(h) // side, torch.arange(w) // side
    windows = rows[:, None] * -(-w // side) + columns
    return windows.flatten().argsort(stable=True)


FAMILY = WindowedFamily(
    "qwen2_5_vl",
    tower_path="visual",
    merge=2,
    merge_order="consecutive",
    rope="mrope",
    own_tower=PackedTower(),
)
