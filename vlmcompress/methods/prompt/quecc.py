"""QueCC: cells of the image are summed up by a query that knows the question (arXiv 2411.03312)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlmcompress.core.errors import ConfigError, MissingTextError, UnsupportedInputError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import FeatureSpace, Needs
from vlmcompress.methods.celled import CellCompressor
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.ops.queries import heads_within
from vlmcompress.methods.ops.windows import Size, windows
from vlmcompress.methods.options import Layer, check_count, check_layers
from vlmcompress.methods.trained import ConnectorShape, cell_grid

#: Layers of the tower whose states are keys and values: `hidden_states[12, 16, 22, 23]` of 24.
LEVELS: tuple[float, ...] = (11 / 24, 15 / 24, 21 / 24, 22 / 24)

Kernel: TypeAlias = tuple[int, int]
#: Where a tower takes images of any size: published for 36 of 24 x 24 patches.
_KERNEL: Kernel = (4, 4)


@dataclass(frozen=True)
class QueCC(CellCompressor):
    """Query-based compression: each cell of the image is asked what matters for the question.

    The question runs through the language model by itself, with what its tokenizer puts around a
    text, and the last state of its last token is added to every patch that queries are made of;
    `QueryCondenser` says the rest. The model's own connector follows. Compressed images are those
    of one question: another one needs them anew.

    Where the connector cannot be parted from the tower, queries are made of the rows that leave it,
    and its place is behind it. It needs training: untrained, rows are drawn by `seed`. The
    arithmetic was checked against the released code, and the names in its files against the list
    `layouts/quecc.json`. Gradients do not reach the language model by way of the question.

    Attributes:
        layers: of the tower, whose states keys and values are made of.
        heads: of the attention, at most; fewer where the width needs it.
    """

    name: ClassVar[str] = "quecc"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.03312"
    reads: ClassVar[FeatureSpace] = "tower"
    layers: tuple[Layer, ...] = LEVELS
    heads: int = 8

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_layers(self.name, self.layers)
        check_count(self.name, "heads", self.heads)

    def needs(self) -> Needs:
        """States of the layers, and the question as the language model reads it."""
        return Needs(states=self.layers, question=True)

    def parts(self, shape: ConnectorShape) -> QueryCondenser:
        """For the rows of this model, and the count of the images that its tower was made for."""
        kernel = _KERNEL
        if shape.grid is not None and shape.tokens is not None:
            kernel = kernel_for(shape.grid, cell_grid(shape.grid, shape.tokens))
        heads = heads_within(shape.width, self.heads)

        def parts() -> QueryCondenser:
            return QueryCondenser(
                shape.width, shape.levels, shape.out, kernel, heads, shape.state_width
            )

        return fresh(parts, self.seed, self.weights)

    def pack(self, tokens: VisualTokens, size: Size, cells: Size) -> Tensor:
        """One row per cell.

        Raises:
            MissingTextError: without a question.
        """
        asked = tokens.evidence.question
        if asked is None:
            raise MissingTextError("quecc sums cells up for a question, and none was given.")
        condenser = required(tokens.parts, QueryCondenser, "connector")
        levels = torch.cat([*tokens.evidence.states.values()], -1)
        made: Tensor = condenser(tokens.features, levels, asked.to(levels.device), size, cells)
        return made


def kernel_for(grid: Size, cells: Size) -> Kernel:
    """(height, width) of the convolution that makes so many cells of a grid."""
    return -(-grid[0] // cells[0]), -(-grid[1] // cells[1])


class QueryCondenser(Learned):
    """The compressor, for one size of cells; it takes other grids and counts as well.

    The question's vector is added to every patch. A perceptron and a depthwise convolution, whose
    stride is its size, make one query of each cell, which attends to the patches of its own cell;
    keys and values come from the states of several layers. There is no residual. Names of the
    parameters are those of the released code.

    Where a grid does not divide into cells of the convolution's size, cells are cut as adaptive
    pooling cuts them, and the map of queries is resized (bilinear) to the nearest grid that does.
    The released code knows square grids that divide only, and gives the same numbers there.

    Args:
        width: of the rows that the connector reads: the tower's states, as a rule.
        levels: layers whose states are read.
        text: width of the question's vector.
        kernel: of the convolution, for the grid that the tower was made for.
        heads: of the attention.
        state_width: of those states, where the rows are others.

    Raises:
        ConfigError: when heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        levels: int,
        text: int,
        kernel: Kernel,
        heads: int = 8,
        state_width: int | None = None,
    ) -> None:
        if width % heads:
            raise ConfigError(
                f"quecc has {heads} heads, and the tower's width is {width}; give a number that "
                "divides it."
            )
        deep = levels * (state_width or width)
        super().__init__(
            method="quecc", width=width, deep=deep, text=text, kernel=kernel, heads=heads
        )
        self.kernel = kernel
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.q_proj = _perceptron(width, width)
        self.k_proj, self.v_proj = _perceptron(deep, width), _perceptron(deep, width)
        self.q_downsample = nn.Conv2d(width, width, kernel, stride=kernel, groups=width)
        self.text_projection = nn.Sequential(nn.Linear(text, width), nn.LayerNorm(width, eps=1e-6))

    def forward(self, x: Tensor, levels: Tensor, text: Tensor, size: Size, cells: Size) -> Tensor:
        """What the model's connector gets instead of patches.

        Args:
            x: [b, n, width] states that the connector reads.
            levels: [b, n, levels * state_width] states of the layers of `LEVELS`, side by side.
            text: [b, text] the vector of each image's question.
            size: (height, width) of the image in patches; n of them.
            cells: (rows, columns) that are left, at most `size`.

        Returns:
            [b, rows * columns, width] float32, in raster order.

        Raises:
            UnsupportedInputError: when the shapes do not fit each other.
        """
        self._check(x, levels, text, size, cells)
        with torch.autocast(x.device.type, enabled=False):
            about = self.text_projection(text.float())[:, None]
            queries = self._queries(self.q_proj(x.float() + about), size, cells)
            return self._attend(queries, levels.float(), size, cells)

    def _queries(self, states: Tensor, size: Size, cells: Size) -> Tensor:
        """[b, cells, width], one of each cell."""
        grid = states.transpose(1, 2).reshape(len(states), -1, *size)
        even = (cells[0] * self.kernel[0], cells[1] * self.kernel[1])
        if even != size:
            grid = interpolate(grid, even, mode="bilinear", align_corners=False)
        made: Tensor = self.q_downsample(grid)
        return made.flatten(2).transpose(1, 2)

    def _attend(self, queries: Tensor, levels: Tensor, size: Size, cells: Size) -> Tensor:
        """Each cell's query over the patches of its cell."""
        b, k, width = queries.shape
        rows, filled = (t.to(queries.device) for t in windows(size, cells))
        keys, values = (
            project(levels)[:, rows].flatten(0, 1) for project in (self.k_proj, self.v_proj)
        )
        empty = ~filled.repeat(b, 1) if rows.numel() > levels.shape[1] else None
        out, _ = self.clip_attn(
            queries.reshape(b * k, 1, width), keys, values, empty, need_weights=False
        )
        made: Tensor = out.reshape(b, k, width)
        return made

    def _check(self, x: Tensor, levels: Tensor, text: Tensor, size: Size, cells: Size) -> None:
        b, n, width = x.shape
        wanted = {
            "features": ((b, n, self.config["width"]), (b, size[0] * size[1], width)),
            "states": ((b, n, self.config["deep"]), tuple(levels.shape)),
            "question": ((b, self.config["text"]), tuple(text.shape)),
        }
        for what, (want, found) in wanted.items():
            if want != found:
                raise UnsupportedInputError(
                    f"quecc's {what} have shape {found}, and {want} were expected; give a grid and "
                    "states of the tower that its parts were made for."
                )
        if not all(1 <= c <= s for c, s in zip(cells, size, strict=True)):
            raise UnsupportedInputError(f"{cells} cells do not fit in a grid of {size} patches.")


def _perceptron(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, out), nn.GELU(), nn.Linear(out, out), nn.LayerNorm(out, eps=1e-6)
    )


def last_states(hidden: Tensor, mask: Tensor) -> Tensor:
    """The vector of each question: the LLM's last state of its last token.

    The released code takes `argmin(mask) - 1`, which is the last column only by wrapping around
    where nothing is padded, and a wrong one under left padding; here it is the last token that is
    none.

    Args:
        hidden: [B, L, d] last hidden states of the question alone.
        mask: [B, L], true where there is a token.

    Returns:
        [B, d].

    Raises:
        UnsupportedInputError: when a question is empty.
    """
    if not bool((mask != 0).any(1).all()):
        raise UnsupportedInputError(
            "quecc needs at least one token of every question; the released code asks about "
            "'image' where there is none."
        )
    place = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    last = place.masked_fill(mask == 0, -1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
