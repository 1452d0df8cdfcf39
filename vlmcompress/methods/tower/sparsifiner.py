"""Sparsifiner: every query looks at the keys that a low-rank predictor names (arXiv 2303.13755)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from vlmcompress.core.errors import ConfigError, ConfigTypeError, EvidenceError
from vlmcompress.methods.learned import Learned, check_weights, fresh
from vlmcompress.methods.ops import cells
from vlmcompress.methods.ops.grid import side_of
from vlmcompress.methods.ops.topk import descending
from vlmcompress.methods.options import Layer, check_count, check_layers
from vlmcompress.methods.tower.base import TowerAttention, layers_within
from vlmcompress.methods.tower.shape import TowerShape
from vlmcompress.methods.tower.sparsity import (
    AttentionSparsifier,
    connected_attention,
    query_blocks,
)


@dataclass(frozen=True)
class Sparsifiner(AttentionSparsifier):
    """Sparse attention whose connections depend on the image.

    In each layer and head, queries and keys are narrowed by a linear layer, keys are brought from n
    rows to r by W_down, and the softmax of their products are each query's coefficients of r basis
    rows W_up, whose sum estimates its attention (§3.2). The k keys with the highest estimates are
    its connections, and exact attention runs over those alone (§3.3). [CLS] looks at all rows, and
    is among those that others may look at.

    It takes no token off: all patches leave the tower, and `keep` is the share of its keys that a
    query looks at (or their count), [CLS] counted among them, rounded as everywhere in the library
    and not up as in the released code. What the algorithm needs of attention is O(n k) products;
    the estimates are O(n^2 r), as in the paper where the basis is not sparse. Both are made for
    some queries at a time, so that no n x n map is ever held, and exact products with all keys, of
    which those not chosen are hidden: gathering the chosen ones takes many times as long. So this
    saves no time over the tower's own kernel and costs some; it tells what a model makes of fewer
    connections, for kernels that skip them.

    The predictor needs training: `handle.parts` are what to train, by `reconstruction_loss`, and
    `weights` loads them. Choosing keys has no gradient. Untrained, W_down are means over cells of
    the map, W_up gives a cell's estimate to its patches, and queries and keys are narrowed by the
    same orthogonal rows, drawn by `seed`. A query then looks at the patches of the cells whose mean
    key it meets best, which is a plausible rule without training, and not the paper's.

    Checked against the released code; its scale (the root of the number of heads) is taken for a
    slip, and that of the head's width used. What thresholds would make exact zeros (basis,
    coefficients; off by default) is left out, and so is the pruning of tokens that it combines
    with; other methods that follow the tower prune. Sections are cited from memory of the paper.

    Attributes:
        layers: blocks that sparsify; all whose output is used when not given.
        rank: n divided by r, the rows that keys are brought to.
        narrow: a head's width divided by that of its narrowed queries and keys.
        seed: of the untrained predictor.
        weights: file of the trained one.
    """

    name: ClassVar[str] = "sparsifiner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.13755"
    training_free: ClassVar[bool] = False
    looks_at: ClassVar[tuple[str, ...]] = ("queries", "keys")
    layers: tuple[Layer, ...] | None = None
    rank: int = 8
    narrow: int = 2
    seed: int = 0
    weights: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.layers is not None:
            check_layers(self.name, self.layers)
        check_count(self.name, "rank", self.rank)
        check_count(self.name, "narrow", self.narrow)
        check_count(self.name, "seed", self.seed, 0)
        check_weights(self.name, self.weights)

    def connections(
        self, n: int, keep: float | int | None, depth: int, last: int
    ) -> tuple[int, ...]:
        """The same in every layer that is named."""
        layers, k = layers_within(self.name, self.layers, depth, last), self.keys_kept(n, keep)
        return tuple(k if layer in layers else n for layer in range(last + 1))

    @property
    def learns(self) -> bool:
        """Always."""
        return True

    def parts(self, shape: TowerShape) -> Predictors:
        """One predictor per layer that sparsifies."""
        layers = list(layers_within(self.name, self.layers, shape.depth, len(shape.plan) - 1))
        head_dim = shape.head_dim
        assert head_dim is not None  # attention that can be made tells
        narrow = max(1, head_dim // self.narrow)

        def make() -> Predictors:
            return Predictors(layers, shape.patches, shape.cls_rows, head_dim, narrow, self.rank)

        return fresh(make, self.seed, self.weights)

    def attend(
        self, layer: int, attention: TowerAttention, k: int, cls_rows: int, parts: Learned | None
    ) -> Tensor:
        """Attention over the `k` most promising keys of each query."""
        if not isinstance(parts, Predictors):
            raise EvidenceError(
                f"sparsifiner needs its predictors and was given {type(parts).__name__}; pass what "
                "its `parts` makes."
            )
        n = attention.k.shape[2]
        predictor = parts.of(layer, n)
        out = []
        if cls_rows:
            out.append(connected_attention(attention, None, slice(0, cls_rows)))
        down = predictor.down_keys(attention.k.detach())
        for rows in query_blocks(attention, cls_rows):
            with torch.no_grad():
                estimates = predictor.estimates(attention.q[:, :, rows], down)
                keys = descending(estimates)[..., :k]
            out.append(connected_attention(attention, keys, rows))
        return torch.cat(out, 2)


class Predictors(Learned):
    """Connectivity predictors of a tower's layers.

    Args:
        layers: that sparsify.
        patches: of an image, a square map.
        cls_rows: rows before them.
        head_dim: width of a head.
        narrow: width that predictors narrow it to.
        rank: rows over rows of the basis.
    """

    def __init__(
        self,
        layers: list[int],
        patches: int,
        cls_rows: int,
        head_dim: int,
        narrow: int,
        rank: int,
    ) -> None:
        basis = _basis(patches, cls_rows, rank)
        super().__init__(
            method="sparsifiner",
            layers=layers,
            rows=patches + cls_rows,
            cls_rows=cls_rows,
            head_dim=head_dim,
            narrow=narrow,
            rank=basis.shape[0],
        )
        self.layers = nn.ModuleDict(
            {str(layer): Predictor(basis, head_dim, narrow) for layer in layers}
        )

    def of(self, layer: int, rows: int) -> Predictor:
        """The predictor of `layer`, for images of so many rows.

        Raises:
            ConfigError: when there is none for such images.
        """
        made: Mapping[str, nn.Module] = dict(self.layers.items())
        predictor = made.get(str(layer))
        if not isinstance(predictor, Predictor) or rows != self.config["rows"]:
            raise ConfigError(
                f"sparsifiner's predictors are for layers {', '.join(made)} and images of "
                f"{self.config['rows']} rows, not for layer {layer} and {rows}; give images of the "
                "size that they were made for."
            )
        return predictor


class Predictor(nn.Module):
    """A low-rank estimate of one layer's attention, alike for all heads.

    Args:
        basis: [r, n] bool, the rows that keys are averaged over and estimates are given to.
        head_dim: width of a head.
        narrow: width it is narrowed to.
    """

    def __init__(self, basis: Tensor, head_dim: int, narrow: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(head_dim, narrow), nn.Linear(head_dim, narrow)
        # Products of what is narrowed stand for products of what was not.
        orthogonal = nn.init.orthogonal_(torch.empty(narrow, head_dim)) * (head_dim / narrow) ** 0.5
        spread = basis.float()
        self.down = nn.Parameter(spread / spread.sum(1, keepdim=True))
        self.up = nn.Parameter(spread * (len(basis) / basis.shape[1]))
        with torch.no_grad():
            for linear in (self.query, self.key):
                linear.weight.copy_(orthogonal)
                linear.bias.zero_()

    def down_keys(self, k: Tensor) -> Tensor:
        """[b, heads, r, narrow] of keys ([b, heads, n, head_dim])."""
        narrowed: Tensor = self.key(k.float())
        return self.down @ narrowed

    def coefficients(self, q: Tensor, down: Tensor) -> Tensor:
        """[b, heads, m, r] of queries ([b, heads, m, head_dim]), each query's summing to 1."""
        narrowed: Tensor = self.query(q.float())
        scale = 1 / math.sqrt(q.shape[-1])
        return (narrowed @ down.transpose(-1, -2) * scale).softmax(-1)

    def estimates(self, q: Tensor, down: Tensor) -> Tensor:
        """[b, heads, m, n] of how much queries attend to each key, by magnitude of the basis."""
        return self.coefficients(q, down) @ self.up.abs()

    def reconstruction(self, q: Tensor, k: Tensor) -> Tensor:
        """[b, heads, m, n] the estimate of their attention that training compares with it."""
        return self.coefficients(q, self.down_keys(k)) @ self.up


def reconstruction_loss(parts: Learned | None, layer: int, attention: TowerAttention) -> Tensor:
    """How far a layer's estimated attention is from what it is (the released attention loss).

    The squares of the differences are averaged, where the released code sums them up with a weight
    of 0.01.

    Args:
        parts: of a `sparsifiner`, as `handle.parts`.
        layer: a block that sparsifies.
        attention: queries and keys of the unpatched tower, [CLS] first where there is one; no
            gradient goes to them.

    Raises:
        ConfigTypeError: for parts of another method.
        ConfigError: for a layer or an image that they do not know.
    """
    if not isinstance(parts, Predictors):
        raise ConfigTypeError(
            f"Attention is estimated by parts of 'sparsifiner', not by {type(parts).__name__}; "
            "pass handle.parts of a model patched with it."
        )
    n, first = attention.k.shape[2], parts.config["cls_rows"]
    patches = slice(first, None)
    predictor = parts.of(layer, n)
    q, k = attention.q.detach(), attention.k.detach()
    want = TowerAttention(q, k, attention.scale).weights(patches)
    return mse_loss(predictor.reconstruction(q[:, :, patches], k), want)


def _basis(patches: int, cls_rows: int, rank: int) -> Tensor:
    """[r, n] bool: which rows lie in each cell of the map; leading rows have their own."""
    side = side_of("sparsifiner", patches)
    cell = cells.fitting(side, max(1, patches // rank))
    owner = cells.owners(side, cell) + cls_rows
    owner = torch.cat([torch.arange(cls_rows), owner])
    return owner == torch.arange(int(owner.max()) + 1)[:, None]
