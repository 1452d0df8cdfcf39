"""LLaVA-UHD v3: windows of tokens are pooled by weights of their own (arXiv 2511.21150, 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.celled import CellCompressor
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.ops.queries import head_count
from vlmcompress.methods.ops.windows import Size, windows
from vlmcompress.methods.options import check_count
from vlmcompress.methods.trained import ConnectorShape


@dataclass(frozen=True)
class Windowed(CellCompressor):
    """Progressive compression: window by window into fewer tokens, with attention in between.

    In each of a few stages the tokens of every window are averaged with weights that a perceptron
    gives them, softmax over the window. The perceptron ends in zeros, so that training starts from
    average pooling (windowed token compression, section 3.1.2). Blocks of attention behind each
    stage, which add nothing at first either, stand for those of the tower.

    The paper pools 2 x 2 windows between blocks of the tower itself and gives its first blocks more
    patches by smaller ones. Between tower and language model only the former can be done: windows
    here are as large as the count and the number of stages ask for, 2 x 2 twice for 36 of 24 x 24
    tokens. The latter is `refined_patch_embedding`, for a tower that is to be trained with smaller
    patches. Pseudo-inverse, windows, softmax and the start from plain averages were checked against
    descriptions of the paper; what exactly its perceptron reads was not, and here it reads a token
    beside the mean of its window. The weights fit every grid and count.

    Attributes:
        stages: times that windows are pooled.
        blocks: of attention behind each of them.
        head_width: channels per head of attention, at least.
    """

    name: ClassVar[str] = "windowed"
    paper: ClassVar[str] = "https://arxiv.org/abs/2511.21150"
    stages: int = 2
    blocks: int = 1
    head_width: int = 64

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_count(self.name, "stages", self.stages)
        check_count(self.name, "blocks", self.blocks, 0)
        check_count(self.name, "head_width", self.head_width)

    def parts(self, shape: ConnectorShape) -> Pooling:
        """Every stage's perceptron and blocks."""
        heads = head_count(shape.width, self.head_width)
        return fresh(
            lambda: Pooling(shape.width, self.stages, self.blocks, heads), self.seed, self.weights
        )

    def pack(self, tokens: VisualTokens, size: Size, cells: Size) -> Tensor:
        """The tokens of the last stage."""
        pooling = required(tokens.parts, Pooling, "connector")
        made: Tensor = pooling(tokens.features, size, cells)
        return made


class Pooling(Learned):
    """Stages of windowed compression.

    Args:
        width: of the tower's states.
        stages: of pooling.
        blocks: of attention behind each.
        heads: of attention.
    """

    def __init__(self, width: int, stages: int, blocks: int, heads: int) -> None:
        super().__init__(method="windowed", width=width, stages=stages, blocks=blocks, heads=heads)
        self.pools = nn.ModuleList([WindowPool(width) for _ in range(stages)])
        self.blocks = nn.ModuleList([_blocks(width, heads, blocks) for _ in range(stages)])

    def forward(self, x: Tensor, size: Size, cells: Size) -> Tensor:
        """Pooled tokens, [b, rows * columns, width] float32 in raster order.

        Args:
            x: [b, h * w, width].
            size: (h, w).
            cells: (rows, columns) of the last stage.
        """
        x = x.float()
        maps = [size, *grids(size, cells, len(self.pools))]
        for step, pool, blocks in zip(pairwise(maps), self.pools, self.blocks, strict=True):
            x = blocks(pool(x, *step))
        return x


class WindowPool(nn.Module):
    """Content-adaptive average of every window.

    Args:
        width: of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(1, width // 4)
        self.norm = nn.LayerNorm(2 * width)
        self.up = nn.Linear(2 * width, hidden)
        self.down = nn.Linear(hidden, 1, bias=False)  # a softmax does not see a bias
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, before: Size, after: Size) -> Tensor:
        """[b, rows * columns, width] of [b, h * w, width].

        Args:
            x: tokens.
            before: (h, w).
            after: (rows, columns).
        """
        rows, filled = (t.to(x.device) for t in windows(before, after))
        inside = x[:, rows]
        there = filled[..., None]
        mean = (inside * there).sum(2, keepdim=True) / there.sum(1, keepdim=True)
        beside = self.norm(torch.cat([inside, mean.expand_as(inside)], -1))
        logits = self.down(nn.functional.gelu(self.up(beside))).masked_fill(~there, -torch.inf)
        pooled: Tensor = (logits.softmax(2) * inside).sum(2)
        return pooled


def grids(size: Size, cells: Size, stages: int) -> list[Size]:
    """(rows, columns) behind each stage, shrinking evenly, every one a multiple of the last.

    Windows of windows are then the windows of the last grid in the first map.

    Args:
        size: (height, width) at first.
        cells: (rows, columns) in the end, at most `size`.
        stages: how many times.
    """

    def side(length: int, k: int, stage: int) -> int:
        wanted = round(math.pow(length / k, 1 - stage / stages))
        return k * max(1, min(length // k, wanted))

    return [
        (side(size[0], cells[0], stage), side(size[1], cells[1], stage))
        for stage in range(1, stages + 1)
    ]


@torch.no_grad()
def refined_patch_embedding(weight: Tensor, patch: Size) -> Tensor:
    """The weights of a patch embedding for smaller patches (section 3.1.1; arXiv 2212.08013).

    A patch of the old size that is resized to the new one is embedded as nearly as before as linear
    weights allow: with B the matrix of the resize, they are the pseudo-inverse of its transpose
    times the old ones.

    Args:
        weight: [d, channels, height, width] of the tower's convolution.
        patch: (height, width) of the new patches.

    Returns:
        [d, channels, *patch] in the dtype of `weight`, computed in float64.

    Raises:
        ConfigError: for weights of another shape, or patches of no pixels.
    """
    if weight.ndim != 4 or min(patch) < 1:
        raise ConfigError(
            f"Patches of {patch[0]} x {patch[1]} pixels cannot be made of weights of shape "
            f"{tuple(weight.shape)}; give those of a convolution, [d, channels, height, width], "
            "and at least one pixel."
        )
    height, width = weight.shape[2:]
    pixels = torch.eye(height * width, dtype=torch.float64, device=weight.device)
    resized = interpolate(
        pixels.reshape(-1, 1, height, width),
        patch,
        mode="bilinear",
        align_corners=False,
        antialias=True,
    ).flatten(1)  # row i: what pixel i of an old patch adds to the new one, the transpose of B
    made: Tensor = weight.double().flatten(2) @ torch.linalg.pinv(resized).T
    return made.reshape(*weight.shape[:2], *patch).to(weight.dtype)


def _blocks(width: int, heads: int, count: int) -> nn.Sequential:
    """Blocks of a vision tower that change nothing until they are trained."""
    made = [
        nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        for _ in range(count)
    ]
    for block in made:
        for linear in (block.self_attn.out_proj, block.linear2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    return nn.Sequential(*made)
