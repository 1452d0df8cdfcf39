"""C-Abstractor of Honeybee: convolutions around adaptive average pooling (arXiv 2312.06742)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from vlmcompress.core.extras import require
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.celled import CellCompressor
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.ops.windows import Size, as_map, as_rows
from vlmcompress.methods.options import check_count
from vlmcompress.methods.trained import ConnectorShape


@dataclass(frozen=True)
class CAbstractor(CellCompressor):
    """Learned positions, a stage of RegNet, pooling to k cells, a second stage, a perceptron.

    Convolutions mix neighbours before and after the average, so that local context survives it
    (section 3.2, figure 3). Stages are those of timm: three bottleneck blocks with depthwise
    3 x 3 convolutions, squeeze and excitation, SiLU and layer norm over channels. The perceptron
    maps to the language model: the whole replaces the connector.

    The released code takes square maps and square counts only (144 and 256 tokens). Here any map
    and any grid of cells will do: positions are interpolated to maps of another size than the
    tower's, and k is the count of `cell_grid`: k where some grid of k cells has a fitting shape,
    else the largest such grid below k. The weights fit every count. It needs training: untrained,
    rows are drawn by `seed`. Honeybee reads the last layer of CLIP; here it is what the model's
    connector reads.

    Pooled cells may share a row or a column of tokens where the map does not divide evenly;
    `assignment` counts each token for the cell that holds most of it. Names in released files were
    checked against the list `layouts/c_abstractor.json`.

    Needs timm: `pip install "vlmcompress[timm]"`.

    Attributes:
        depth: blocks per stage.
        hidden: channels of the stages; as many as the tower has when not given.
        table: side of the positions where the tower takes images of any size and has no grid of
            its own.
    """

    name: ClassVar[str] = "c_abstractor"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.06742"
    gives: ClassVar[Literal["tower", "llm"]] = "llm"
    depth: int = 3
    hidden: int | None = None
    table: int = 24

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_count(self.name, "depth", self.depth)
        check_count(self.name, "table", self.table)
        if self.hidden is not None:
            check_count(self.name, "hidden", self.hidden)

    def parts(self, shape: ConnectorShape) -> Abstractor:
        """Positions, stages and the perceptron to the language model.

        Raises:
            MissingExtraError: without timm.
        """
        grid = shape.grid or (self.table, self.table)
        hidden = self.hidden or shape.width

        def make() -> Abstractor:
            return Abstractor(shape.width, shape.out, hidden, self.depth, grid)

        return fresh(make, self.seed, self.weights)

    def pack(self, tokens: VisualTokens, size: Size, cells: Size) -> Tensor:
        """One row per cell, in the space of the language model."""
        abstractor = required(tokens.parts, Abstractor, "connector")
        rows: Tensor = abstractor(tokens.features, size, cells)
        return rows


class Abstractor(Learned):
    """Stages around pooling. Names are those of released files.

    Args:
        width: of the tower's states.
        out: of the language model's rows.
        hidden: channels of the stages.
        depth: blocks per stage.
        grid: (height, width) of the positions.
    """

    def __init__(self, width: int, out: int, hidden: int, depth: int, grid: Size) -> None:
        super().__init__(
            method="c_abstractor", width=width, out=out, hidden=hidden, depth=depth, grid=grid
        )
        self.grid = grid
        self.pos_emb = nn.Parameter(torch.empty(1, grid[0] * grid[1], width))
        nn.init.trunc_normal_(self.pos_emb, std=0.02)
        # Released files count the pooling between the stages, which holds no weights.
        self.net = nn.ModuleDict(
            {"0": _stage(depth, width, hidden), "2": _stage(depth, hidden, hidden)}
        )
        self.readout = nn.Sequential(nn.Linear(hidden, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, x: Tensor, size: Size, cells: Size) -> Tensor:
        """One row per cell, [b, k, out] in float32.

        Args:
            x: [b, h * w, width].
            size: (h, w) of the map.
            cells: (rows, columns) of the cells.
        """
        maps = as_map(x.float(), size) + self.positions(size)
        pooled = self.net["2"](adaptive_avg_pool2d(self.net["0"](maps), cells))
        made: Tensor = self.readout(as_rows(pooled))
        return made

    def released(self, name: str, tensor: Tensor) -> Tensor:
        """Early files hold a position of [CLS] before the others; Honeybee passes over it, too."""
        one_more = name == "pos_emb" and tensor.shape[1] == self.pos_emb.shape[1] + 1
        return tensor[:, 1:] if one_more else tensor

    def positions(self, size: Size) -> Tensor:
        """[1, width, h, w] positions of a map, interpolated where it is not the table's size."""
        table = as_map(self.pos_emb, self.grid)
        return table if size == self.grid else interpolate(table, size=size, mode="bicubic")


def _stage(depth: int, width: int, out: int) -> nn.Module:
    """A stage of RegNet.

    Raises:
        MissingExtraError: without timm.
    """
    norm: Any = require("timm.layers").LayerNorm2d
    regnet: Any = require("timm.models.regnet").RegStage
    make = partial(regnet, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=norm)
    stage: nn.Module = make(depth, width, out)
    return stage
