"""TokenPacker: coarse queries gather the detail of their own cell (arXiv 2407.02392)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import Needs
from vlmcompress.methods.celled import CellCompressor
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.ops.queries import head_count
from vlmcompress.methods.ops.windows import Size, as_map, as_rows, windows
from vlmcompress.methods.options import Layer, check_count, check_layers
from vlmcompress.methods.trained import ConnectorShape


@dataclass(frozen=True)
class TokenPacker(CellCompressor):
    """One query per cell of the image, from the shrunk map, attends to the tokens of its cell.

    The map that the connector would read is shrunk bilinearly to one query per cell. Keys and
    values are perceptrons of the states of several tower layers side by side. Each query attends to
    its own cell only (region to point), without a residual, as in the released code, and a
    perceptron maps the result to the language model: it replaces the connector.

    Published for cells of 2 x 2, 3 x 3 and 4 x 4 of 24 x 24 patches (144, 64 and 36 tokens). Here
    any grid of cells will do: of a map that k cells cannot share evenly, some are a row or a column
    larger, and what smaller ones lack is masked. The count is that of `cell_grid`: k where some
    grid of k cells has a fitting shape, else the largest such grid below k. The weights fit every
    count. It needs training: untrained, rows are drawn by `seed`.

    The arithmetic was checked against the released code, the names in its files against the list
    `layouts/tokenpacker.json`.

    Attributes:
        layers: of the tower, whose states keys and values are made of; those published are states
            12, 16, 22 and 23 of the 24 layers of CLIP ViT-L, counted from 1. Empty: what the
            connector reads, as for the queries.
        head_width: channels per head of attention, at least.
    """

    name: ClassVar[str] = "tokenpacker"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.02392"
    gives: ClassVar[Literal["tower", "llm"]] = "llm"
    layers: tuple[Layer, ...] = (11 / 24, 15 / 24, 21 / 24, 22 / 24)
    head_width: int = 128

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.layers != ():
            check_layers(self.name, self.layers)
        check_count(self.name, "head_width", self.head_width)

    def needs(self) -> Needs:
        """States of the layers."""
        return Needs(states=self.layers)

    def parts(self, shape: ConnectorShape) -> Packing:
        """Projections, attention and the perceptron to the language model."""
        deep = shape.levels * (shape.state_width or shape.width) or shape.width
        heads = head_count(shape.width, self.head_width)

        def make() -> Packing:
            return Packing(shape.width, shape.out, deep, heads, self.layers)

        return fresh(make, self.seed, self.weights)

    def pack(self, tokens: VisualTokens, size: Size, cells: Size) -> Tensor:
        """One row per cell, in the space of the language model."""
        packing = required(tokens.parts, Packing, "connector")
        states = [*tokens.evidence.states.values()] or [tokens.features]
        rows: Tensor = packing(tokens.features, torch.cat(states, -1), size, cells)
        return rows


class Packing(Learned):
    """Queries of cells attend to the tokens of their cells. Names are those of released files.

    Args:
        width: of the rows that queries are made of.
        out: of the language model's rows.
        deep: width of what keys and values are made of, all layers together.
        heads: of the attention.
        layers: that those are; they change nothing here.
    """

    def __init__(
        self, width: int, out: int, deep: int, heads: int, layers: Sequence[Layer] = ()
    ) -> None:
        super().__init__(
            method="tokenpacker", width=width, out=out, deep=deep, heads=heads, layers=list(layers)
        )
        norm = partial(nn.LayerNorm, width, eps=1e-6)
        self.q_proj_1 = nn.Linear(width, width, bias=False)
        self.k_proj_1, self.v_proj_1 = (_perceptron(deep, width) for _ in "kv")
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = norm(), norm(), norm()
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = _perceptron(width, out)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, deep: Tensor, size: Size, cells: Size) -> Tensor:
        """One row per cell, [b, k, out] in float32.

        Args:
            x: [b, h * w, width] what queries are made of.
            deep: [b, h * w, deep] what keys and values are made of.
            size: (h, w) of the map.
            cells: (rows, columns) of the cells.
        """
        rows, filled = (t.to(x.device) for t in windows(size, cells))
        rough = as_rows(interpolate(as_map(x.float(), size), size=cells, mode="bilinear"))
        q = self.ln_q_1(self.q_proj_1(rough))
        deep = deep.float()
        key, value = self.ln_k_1(self.k_proj_1(deep)), self.ln_v_1(self.v_proj_1(deep))
        uneven = rows.numel() > size[0] * size[1]
        packed, _ = self.clip_attn(
            q.flatten(0, 1)[:, None],
            key[:, rows].flatten(0, 1),
            value[:, rows].flatten(0, 1),
            key_padding_mask=~filled.repeat(len(x), 1) if uneven else None,
            need_weights=False,
        )
        made: Tensor = self.mlp(packed.reshape(q.shape))
        return made


def _perceptron(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
