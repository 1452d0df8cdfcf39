"""QueCC: cells of the image are summed up by a query that knows the question (arXiv 2411.03312)."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlmcompress.core.errors import ConfigError, UnsupportedInputError
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.ops.windows import Size, windows

#: Layers of the tower whose states are keys and values: `hidden_states[12, 16, 22, 23]` of 24.
LEVELS: tuple[float, ...] = (11 / 24, 15 / 24, 21 / 24, 22 / 24)

Kernel: TypeAlias = tuple[int, int]


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
        width: of the tower's states.
        levels: layers whose states are read.
        text: width of the question's vector.
        kernel: of the convolution, for the grid that the tower was made for.
        heads: of the attention.

    Raises:
        ConfigError: when heads do not divide the width.
    """

    def __init__(self, width: int, levels: int, text: int, kernel: Kernel, heads: int = 8) -> None:
        if width % heads:
            raise ConfigError(
                f"quecc has {heads} heads, and the tower's width is {width}; give a number that "
                "divides it."
            )
        super().__init__(
            method="quecc", width=width, levels=levels, text=text, kernel=kernel, heads=heads
        )
        self.kernel = kernel
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.q_proj = _perceptron(width, width)
        self.k_proj = _perceptron(levels * width, width)
        self.v_proj = _perceptron(levels * width, width)
        self.q_downsample = nn.Conv2d(width, width, kernel, stride=kernel, groups=width)
        self.text_projection = nn.Sequential(nn.Linear(text, width), nn.LayerNorm(width, eps=1e-6))

    def forward(self, x: Tensor, levels: Tensor, text: Tensor, size: Size, cells: Size) -> Tensor:
        """What the model's connector gets instead of patches.

        Args:
            x: [b, n, width] states that the connector reads.
            levels: [b, n, levels * width] states of the layers of `LEVELS`, side by side.
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
            "states": ((b, n, self.config["levels"] * width), tuple(levels.shape)),
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
