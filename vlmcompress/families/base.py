"""What the library knows about a model family: facts, never a copy of a forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmcompress.core.tokens import Segment
from vlmcompress.families.towers import TOWERS, Tower

Grid = tuple[int, int]
Reduce = Literal["sum", "mean"]


@dataclass(frozen=True)
class Layout:
    """How the tokens of one image lie.

    Attributes:
        segments: rectangles of tokens.
        tile: [n] which view each token shows (see `VisualTokens.tile`); None for a single view.
    """

    segments: tuple[Segment, ...]
    tile: tuple[int, ...] | None = None

    @classmethod
    def single(cls, grid: Grid) -> Layout:
        """One view, in raster order."""
        h, w = grid
        return cls((Segment("image", (1, h, w), slice(0, h * w)),))


@dataclass(frozen=True)
class Family:
    """Facts about one model family; subclasses override what differs.

    Attributes:
        model_type: `config.model_type` of the outer model.
        tower_path: path from the base model to the vision tower.
        connector_path: path to the connector when it maps tokens one by one, so that selecting rows
            before it equals selecting after it and the rest of the family's code does not count
            rows; else None.
        connector_reads_states: whether the connector reads the tower's states themselves, and not
            something made of them.
        merge: side of the square of patches that forms one token.
        merge_order: whether patches of one token follow each other (`consecutive`) or lie in a
            raster.
        rope: 1-D positions or M-RoPE.
        position_offset: what a plain forward adds to 0-based default positions.
        sees_ahead: whether rows of a prompt see later ones (prefix or image blocks), so that masks
            inside the language model must be cut out of the model's own.
        own_tower: how to read the tower of a family that always has the same one.
    """

    model_type: str
    tower_path: str = "vision_tower"
    connector_path: str | None = None
    connector_reads_states: bool = True
    merge: int = 1
    merge_order: Literal["raster", "consecutive"] = "raster"
    rope: Literal["1d", "mrope"] = "1d"
    position_offset: int = 0
    sees_ahead: bool = False
    own_tower: Tower | None = None

    def tower_module(self, base: nn.Module) -> nn.Module:
        """The vision tower."""
        return base.get_submodule(self.tower_path)

    def tower(self, base: nn.Module) -> Tower | None:
        """How to read the tower's attention; None where that is not known."""
        if self.own_tower is not None:
            return self.own_tower
        config = getattr(self.tower_module(base), "config", None)
        return TOWERS.get(getattr(config, "model_type", ""))

    def connector(self, base: nn.Module) -> nn.Module | None:
        """The connector, when rows may be selected before it."""
        return None if self.connector_path is None else base.get_submodule(self.connector_path)

    def last_read_layer(self, base: nn.Module, call: Mapping[str, Any], depth: int) -> int:
        """Last tower layer the connector reads (the very last unless a family says else)."""
        return depth - 1

    def read_layers(self, base: nn.Module, call: Mapping[str, Any], depth: int) -> tuple[int, ...]:
        """Tower layers whose outputs the connector reads, side by side."""
        return (self.last_read_layer(base, call, depth),)

    def whole_layers(self, base: nn.Module) -> frozenset[int] | None:
        """Tower layers whose attention is over whole images; None for all."""
        return None

    def grids(self, base: nn.Module, call: Mapping[str, Any], lengths: Sequence[int]) -> list[Grid]:
        """(h, w) in tokens of each image; square images unless a family says else.

        Args:
            base: the model that holds tower and LLM.
            call: keyword arguments of `get_image_features`.
            lengths: tokens of each image.
        """
        return [_square(length) for length in lengths]

    def layouts(
        self, base: nn.Module, call: Mapping[str, Any], lengths: Sequence[int]
    ) -> list[Layout]:
        """How the tokens of each image lie; one grid unless a family says else."""
        return [Layout.single(grid) for grid in self.grids(base, call, lengths)]

    def by_token(
        self,
        base: nn.Module,
        call: Mapping[str, Any],
        captured: Sequence[Tensor],
        units: Sequence[int],
        layout: Layout,
        reduce: Reduce,
    ) -> Tensor:
        """What was captured in the tower, patch by patch, as values of an image's tokens.

        Args:
            base: the model that holds tower and LLM.
            call: keyword arguments of `get_image_features`.
            captured: one [views, ..., patches] of all images, or one such tensor per image.
            units: the images wanted; they share one layout.
            layout: theirs.
            reduce: how values of patches that form one token are joined.

        Returns:
            [units, ..., n].
        """
        if len(captured) == 1:
            rows = captured[0][list(units)]
        else:
            rows = torch.cat([captured[i] for i in units])
        _, h, w = layout.segments[0].grid
        return self.group(rows, (h, w), reduce)

    def group(self, rows: Tensor, grid: Grid, reduce: Reduce) -> Tensor:
        """Patch values to token values.

        Args:
            rows: [..., patches], in the tower's row order.
            grid: the image's (h, w) in tokens.
            reduce: how values of one token's patches are joined.

        Returns:
            [..., h * w].
        """
        if self.merge == 1:
            return rows
        m, (h, w) = self.merge, grid
        if self.merge_order == "consecutive":
            groups = rows.unflatten(-1, (h * w, m * m))
        else:
            groups = rows.unflatten(-1, (h, m, w, m)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        return groups.sum(-1) if reduce == "sum" else groups.mean(-1)


@dataclass(frozen=True)
class GridFamily(Family):
    """Families whose processor gives `image_grid_thw`, patches per image in (t, h, w)."""

    def grids(self, base: nn.Module, call: Mapping[str, Any], lengths: Sequence[int]) -> list[Grid]:
        """Token grids from `image_grid_thw`."""
        grid = torch.as_tensor(call["image_grid_thw"]).tolist()
        return [(h // self.merge, w // self.merge) for _, h, w in grid]


def _square(length: int) -> Grid:
    side = round(length**0.5)
    return (side, side) if side * side == length else (1, length)
