"""LLaVA-Mini: one token per image, after the text has seen all of them (arXiv 2501.03895)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlmcompress.core.errors import ConfigError, UnsupportedInputError, UnsupportedModelError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import FeatureSpace
from vlmcompress.methods.celled import whole_map
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.ops.grid import squarest
from vlmcompress.methods.ops.queries import heads_within, stand_for
from vlmcompress.methods.options import check_count
from vlmcompress.methods.prompt.base import PromptCompressor
from vlmcompress.methods.trained import ConnectorShape

Size: TypeAlias = tuple[int, int]
Layers: TypeAlias = Callable[[], Iterable[nn.Module]]
#: Runs one layer: (layer, rows [B, L, d], allowed [B, 1, L, L] bool, positions [B, L]) to rows.
Run: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LLaVAMini(PromptCompressor):
    """A few queries sum an image up, after its text has seen all of it.

    The queries attend to the rows that the connector reads, and the model's own connector follows
    (`Resampler`). Before the prompt enters the LLM, copies of the LLM's first layers run over all
    rows of its images, their compressed rows and its text, in this order; compressed rows and text
    go on as these leave them (modality pre-fusion, `Fusion`). Answers, which are the rows with a
    label and what is generated, go in as they are and are not seen. Where no connector can be
    parted from the tower, queries attend to the rows that leave it.

    Text of earlier turns is in the cache and not seen again: a later turn is fused with its own
    images, and as plain text where it has none. It needs training: untrained, queries are drawn by
    `seed`. The compressor was checked against the released code, the names in its files against the
    list `layouts/llava_mini.json`.

    Attributes:
        fusion: layers of pre-fusion; 0 for compression alone.
        heads: of the compressor's attention, at most; fewer where the width needs it.
    """

    name: ClassVar[str] = "llava_mini"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.03895"
    reads: ClassVar[FeatureSpace] = "tower"
    fusion: int = 4
    heads: int = 8

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_count(self.name, "fusion", self.fusion, 0)
        check_count(self.name, "heads", self.heads)

    @property
    def fuses(self) -> int:
        """`fusion`."""
        return self.fusion

    def parts(self, shape: ConnectorShape) -> Fusion:
        """Queries in the squarest grid that has as many, and copies of the first layers.

        Raises:
            UnsupportedModelError: for rows whose width places cannot share.
        """
        k, width, make = self.count(shape), shape.width, shape.first_layers
        assert make is not None  # every shape of a model has them
        if width % 4:
            raise UnsupportedModelError(
                "llava_mini gives a quarter of its channels each to sines and cosines of rows and "
                f"columns, and what this model's connector reads has {width}; use a method such as "
                "'voco_llama', which learns behind the connector."
            )

        def parts() -> Fusion:
            grid, heads = squarest(k, k), heads_within(width, self.heads)
            return Fusion(width, shape.out, grid, lambda: make(self.fusion), heads)

        return fresh(parts, self.seed, self.weights)

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """The queries' rows.

        Raises:
            ConfigError: for several rectangles, when an earlier method dropped or merged tokens,
                and for another count than that of the queries.
        """
        size, k = whole_map(self.name, tokens), self.budget(tokens, keep)
        compressor = required(tokens.parts, Fusion, "prompt").compressor
        queries = compressor.grid[0] * compressor.grid[1]
        if k != queries:
            raise self.refuse_count(tokens.n, k, queries)
        rows, attention = compressor(tokens.features, size)
        source, moved = stand_for(attention.detach())
        return tokens.regroup(rows.to(tokens.features.dtype), source, moved)


class Resampler(nn.Module):
    """A few queries with places attend to the patches of an image.

    Keys are the normalised patches plus sine and cosine of their places, resized (bicubic) from
    those of the queries; values have no places. Names of the parameters are those of the released
    code, in which the grid is a square.

    Args:
        width: of the tower's states.
        grid: (rows, columns) of queries.
        heads: of the attention.

    Raises:
        ConfigError: for a width that heads or places cannot share.
    """

    def __init__(self, width: int, grid: Size, heads: int = 8) -> None:
        if width % heads or width % 4:
            raise ConfigError(
                f"llava_mini needs a tower whose width {heads} heads and 4 can divide, and this "
                f"one's is {width}; set heads."
            )
        super().__init__()
        self.grid = grid
        places = sines(grid, width)
        self.pos_embed = nn.Parameter(places, requires_grad=False)  # in released files, but fixed
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty_like(places), std=0.02))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Compressed rows, in the order of the queries, and what they attend to.

        Args:
            x: [b, n, width] patches of images of one size.
            size: (height, width) of them in patches; n of them.

        Returns:
            [b, k, width] float32 and [b, k, n], attention averaged over heads.
        """
        if x.shape[1] != size[0] * size[1]:
            raise UnsupportedInputError(
                f"llava_mini got {x.shape[1]} patches of a {size[0]} x {size[1]} grid; give whole "
                "images."
            )
        with torch.autocast(x.device.type, enabled=False):
            patches = self.ln_kv(x.float())
            queries = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
            out, attention = self.attn(queries, patches + self._places(size), patches)
        return out, attention

    def _places(self, size: Size) -> Tensor:
        """[n, width] of the patches."""
        if size == self.grid:
            return self.pos_embed
        grid = self.pos_embed.T.reshape(1, -1, *self.grid)
        resized = interpolate(grid, size, mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T


class Fusion(Learned):
    """The compressor and the layers of modality pre-fusion.

    Args:
        width: of the tower's states.
        out: width of the LLM's rows.
        grid: (rows, columns) of tokens that are left of an image.
        layers: makes the layers of pre-fusion: copies of the LLM's first ones, without a cache.
        heads: of the compressor's attention.
    """

    def __init__(self, width: int, out: int, grid: Size, layers: Layers, heads: int = 8) -> None:
        made = list(layers())
        super().__init__(
            method="llava_mini", width=width, out=out, grid=grid, heads=heads, fusion=len(made)
        )
        self.compressor = Resampler(width, grid, heads)
        self.prefusion_layers = nn.ModuleList(made)

    def fuse(self, prompt: Fusible, run: Run) -> tuple[Tensor, Tensor]:
        """Rows of the image and of the text that have seen each other.

        Args:
            prompt: what goes in.
            run: how a layer of this LLM is called.

        Returns:
            [B, C, out] compressed and [B, T, out] text, in the dtype of the text. Rows of the text
            that do not take part, answers above all, are those that came in; so is all of the text
            of prompts without an image.
        """
        rows, taking = prompt.rows, prompt.taking
        allowed, positions = causal(taking), places(taking)
        with torch.autocast(rows.device.type, enabled=False):
            for layer in self.prefusion_layers:
                rows = run(layer, rows, allowed, positions)
        first = prompt.vision.shape[1]
        end = first + prompt.compressed.shape[1]
        fused = rows.to(prompt.text.dtype)
        changed = prompt.asking & prompt.filled.any(1, keepdim=True)
        text = torch.where(changed[..., None], fused[:, end:], prompt.text)
        return fused[:, first:end], text


@dataclass(frozen=True)
class Fusible:
    """What pre-fusion reads of a batch of prompts, each part padded to one length.

    Attributes:
        vision: [B, V, d] all rows of the images, as the LLM would receive them uncompressed.
        seen: [B, V] bool, false where padded.
        compressed: [B, C, d] rows of the compressor behind the model's connector.
        filled: [B, C] bool, false where padded.
        text: [B, T, d] the prompt's other embeddings, in their order.
        asking: [B, T] bool, false where padded and in answers: what is generated later must not
            have been seen before.
    """

    vision: Tensor
    seen: Tensor
    compressed: Tensor
    filled: Tensor
    text: Tensor
    asking: Tensor

    @property
    def rows(self) -> Tensor:
        """[B, V + C + T, d] float32, in the published order."""
        parts = (self.vision, self.compressed, self.text)
        return torch.cat([part.float() for part in parts], dim=1)

    @property
    def taking(self) -> Tensor:
        """[B, V + C + T] bool, rows that take part."""
        return torch.cat([self.seen, self.filled, self.asking], dim=1)


def causal(taking: Tensor) -> Tensor:
    """[B, 1, L, L] bool, what each row may attend to: rows up to it that take part, and itself.

    Args:
        taking: [B, L] bool.
    """
    length = taking.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=taking.device)
    # A row that takes no part still needs a key, or its softmax is 0 / 0.
    return ((itself.new_ones(length, length).tril() & taking[:, None]) | itself)[:, None]


def places(taking: Tensor) -> Tensor:
    """[B, L] position ids that count the rows which take part ([B, L] bool)."""
    return (taking.long().cumsum(1) - 1).clamp(min=0)


def sines(grid: Size, width: int) -> Tensor:
    """[rows * columns, width] sine and cosine of columns, then of rows, at frequencies from 1 down.

    Args:
        grid: (rows, columns).
        width: a multiple of 4.
    """
    row, column = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij"
    )
    steps = torch.arange(width // 4, dtype=torch.float32) / (width / 4)
    angles = [axis.flatten()[:, None] * 10000.0**-steps for axis in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
