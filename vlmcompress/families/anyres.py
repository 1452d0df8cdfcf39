"""AnyRes: an image seen as a whole and cut into tiles, packed without padding, with newlines.

How tokens lie is read off the model's own packing: it is run on row numbers instead of features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmcompress.core.tokens import Segment
from vlmcompress.families.base import Layout, Reduce
from vlmcompress.families.llava import Llava

_NEWLINE = -9.0  # far from every row and column of tiles


@dataclass(frozen=True)
class AnyRes(Llava):
    """Facts about models that pack the views of an image with `pack_image_features`.

    The packing counts rows, so tokens are selected after it and after the connector.
    """

    connector_path: str | None = None

    def views(self, base: nn.Module, call: Mapping[str, Any]) -> list[int]:
        """Passes of the tower per image: the whole and its tiles."""
        count = _module(base).image_size_to_num_patches
        config: Any = base.config
        return [
            count(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in torch.as_tensor(call["image_sizes"]).tolist()
        ]

    def packing(self, base: nn.Module, call: Mapping[str, Any]) -> dict[str, Any]:
        """What `pack_image_features` takes besides features, sizes and newline."""
        config: Any = base.config
        name = "vision_feature_select_strategy"
        return {name: call.get(name) or vars(config)[name]}

    def pack(
        self,
        base: nn.Module,
        call: Mapping[str, Any],
        views: Tensor,
        image: int,
        newline: float = 0.0,
    ) -> Tensor:
        """Pack values of one image's patches as the model packs its features.

        Args:
            base: the model that holds tower and LLM.
            call: keyword arguments of `get_image_features`.
            views: [views, patches, channels].
            image: which image of the call this is.
            newline: value of newline rows.

        Returns:
            [n, channels].
        """
        sizes = torch.as_tensor(call["image_sizes"])[image : image + 1]
        rows, _ = base.pack_image_features(  # type: ignore[operator]
            [views],
            sizes,
            image_newline=views.new_full(views.shape[-1:], newline),
            **self.packing(base, call),
        )
        return rows[0]  # type: ignore[no-any-return]

    def layouts(
        self, base: nn.Module, call: Mapping[str, Any], lengths: Sequence[int]
    ) -> list[Layout]:
        """The whole view, then the map of all tiles with a newline at the end of each row."""
        counts = self.views(base, call)
        known: dict[tuple[int, ...], Layout] = {}
        layouts = []
        sizes = torch.as_tensor(call["image_sizes"]).tolist()
        for i, (count, size) in enumerate(zip(counts, sizes, strict=True)):
            key = (count, *size)
            if key not in known:
                known[key] = self._layout(base, call, i, count)
            layouts.append(known[key])
        return layouts

    def _layout(self, base: nn.Module, call: Mapping[str, Any], image: int, views: int) -> Layout:
        config: Any = base.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        patches = side * side
        columns = _tile_columns(base, call, image) if views > 1 else 1
        # Tiles are told apart by row and column, so that where tiles are shrunk together the
        # mixture of two is rounded to one of them.
        number = torch.arange(views, dtype=torch.float32) - 1
        place = torch.stack([number.div(columns, rounding_mode="floor"), number % columns], -1)
        tagged = place[:, None].expand(views, patches, 2).contiguous()
        packed = self.pack(base, call, tagged, image, newline=_NEWLINE)
        down, across = packed.round().long().unbind(-1)
        tile = 1 + down * columns + across
        tile[:patches] = 0
        tile[down == int(_NEWLINE)] = -1
        segments = [Segment("base", (1, side, side), slice(0, patches))]
        rest = len(tile) - patches
        if views > 1:
            rows = int((tile < 0).sum())
            segments.append(Segment("tile", (1, rows, rest // rows), slice(patches, len(tile))))
        return Layout(tuple(segments), tuple(tile.tolist()))

    def by_token(
        self,
        base: nn.Module,
        call: Mapping[str, Any],
        captured: Sequence[Tensor],
        units: Sequence[int],
        layout: Layout,
        reduce: Reduce,
    ) -> Tensor:
        """Captured values packed like features; newlines get 0.

        Where the model shrinks the map of tiles, values are interpolated alike, which is a mean
        whatever `reduce` says.
        """
        (values,) = captured
        views = values.split(self.views(base, call))
        rows = [self.pack(base, call, views[i].flatten(1, -2).transpose(1, 2), i).T for i in units]
        return torch.stack(rows).unflatten(1, values.shape[1:-1])


def _module(base: nn.Module) -> Any:
    """The module that defines the model: it holds the functions that count tiles."""
    import sys

    return sys.modules[type(base).__module__]


def _tile_columns(base: nn.Module, call: Mapping[str, Any], image: int) -> int:
    config: Any = base.config
    size = torch.as_tensor(call["image_sizes"])[image].tolist()
    shape = _module(base).get_anyres_image_grid_shape
    return int(shape(size, config.image_grid_pinpoints, config.vision_config.image_size)[1])
