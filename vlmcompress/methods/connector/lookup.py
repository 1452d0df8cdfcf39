"""LookupViT's bidirectional cross attention as a compressor (arXiv 2407.12753, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.celled import CellCompressor
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.ops.queries import head_count
from vlmcompress.methods.ops.windows import Size, as_map, as_rows
from vlmcompress.methods.options import check_count, check_number
from vlmcompress.methods.trained import ConnectorShape


@dataclass(frozen=True)
class Lookup(CellCompressor):
    """A few compressed tokens and all lookup tokens read each other, and the few go on.

    The compressed tokens start as the image at the resolution of k cells (bilinear, smoothed). In
    every block they gather from the lookup tokens by cross attention, are refined by self attention
    and a perceptron of full width, and hand on what they have found: the lookup tokens attend to
    them with the same similarities, transposed, and go through a narrow perceptron. Behind the last
    block nobody reads the lookup tokens, so it leaves them alone.

    The paper makes a backbone of such blocks, trained from nothing, and averages both kinds of
    tokens in its head. Here they stand behind a trained tower: the compressed tokens go to the
    model's own connector, and all that is added to them starts at zero, so that untrained parts
    give the smaller image itself. Positions are those that the tower has worked into its states.
    The authors have published no code. The weights fit every grid and count, which may be drawn
    anew at every step of training, as the paper does.

    Attributes:
        depth: blocks.
        head_width: channels per head of attention, at least.
        wide: width of the perceptrons of compressed tokens, over the tower's.
        narrow: width of those of lookup tokens, over the tower's.
    """

    name: ClassVar[str] = "lookup"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.12753"
    depth: int = 2
    head_width: int = 64
    wide: float = 4.0
    narrow: float = 0.5

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_count(self.name, "depth", self.depth)
        check_count(self.name, "head_width", self.head_width)
        for option, value in (("wide", self.wide), ("narrow", self.narrow)):
            check_number(self.name, option, value, 0, 16)
            if value == 0:
                raise ConfigError(f"lookup's {option} is 0; it must be above.")

    def parts(self, shape: ConnectorShape) -> Exchanges:
        """All blocks."""
        heads = head_count(shape.width, self.head_width)
        wide, narrow = (max(1, int(shape.width * share)) for share in (self.wide, self.narrow))

        def make() -> Exchanges:
            return Exchanges(shape.width, self.depth, heads, wide, narrow)

        return fresh(make, self.seed, self.weights)

    def pack(self, tokens: VisualTokens, size: Size, cells: Size) -> Tensor:
        """The compressed tokens behind the last block."""
        exchanges = required(tokens.parts, Exchanges, "connector")
        made: Tensor = exchanges(tokens.features, size, cells)
        return made


class Exchanges(Learned):
    """Blocks in which compressed and lookup tokens read each other.

    Args:
        width: of the tower's states.
        depth: blocks.
        heads: of attention.
        wide: hidden width of compressed tokens' perceptrons.
        narrow: of lookup tokens'.
    """

    def __init__(self, width: int, depth: int, heads: int, wide: int, narrow: int) -> None:
        super().__init__(
            method="lookup", width=width, depth=depth, heads=heads, wide=wide, narrow=narrow
        )
        self.blocks = nn.ModuleList(
            [Exchange(width, heads, wide, narrow if i + 1 < depth else None) for i in range(depth)]
        )

    def forward(self, x: Tensor, size: Size, cells: Size) -> Tensor:
        """Compressed tokens, [b, k, width] float32 in raster order.

        Args:
            x: [b, h * w, width].
            size: (h, w).
            cells: (rows, columns), k of them.
        """
        lookup = x.float()
        small = interpolate(
            as_map(lookup, size), cells, mode="bilinear", align_corners=False, antialias=True
        )
        compressed = as_rows(small)
        for block in self.blocks:
            compressed, lookup = block(compressed, lookup)
        return compressed


class Exchange(nn.Module):
    """One block.

    Args:
        width: of the states.
        heads: of attention.
        wide: hidden width of the compressed tokens' perceptron.
        narrow: of the lookup tokens'; None leaves these as they are.
    """

    def __init__(self, width: int, heads: int, wide: int, narrow: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.norm_compressed, self.norm_lookup = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.gather, self.gathered = nn.Linear(width, width), _silent(nn.Linear(width, width))
        self.refine = nn.TransformerEncoderLayer(
            width, heads, wide, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        _silent(self.refine.self_attn.out_proj)
        _silent(self.refine.linear2)
        self.infuse: nn.ModuleDict | None = None
        if narrow is not None:
            self.infuse = nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "value": nn.Linear(width, width),
                    "out": _silent(nn.Linear(width, width)),
                    "perceptron": nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, narrow),
                        nn.GELU(),
                        _silent(nn.Linear(narrow, width)),
                    ),
                }
            )

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        """Both kinds of tokens, [b, k, width] and [b, n, width]."""
        seen = self.norm_lookup(lookup)
        queries, keys = self.query(self.norm_compressed(compressed)), self.key(seen)
        similarity = self._split(queries) @ self._split(keys).transpose(-1, -2)
        similarity = similarity * (compressed.shape[-1] // self.heads) ** -0.5
        gathered = self._weighted(similarity, self.gather(seen))
        compressed = self.refine(compressed + self.gathered(gathered))
        if self.infuse is None:
            return compressed, lookup
        value = self.infuse["value"](self.infuse["norm"](compressed))
        handed = self._weighted(similarity.transpose(-1, -2), value)
        lookup = lookup + self.infuse["out"](handed)
        return compressed, lookup + self.infuse["perceptron"](lookup)

    def _split(self, rows: Tensor) -> Tensor:
        """[b, n, width] to [b, heads, n, head_width]."""
        return rows.reshape(*rows.shape[:2], self.heads, -1).transpose(1, 2)

    def _weighted(self, similarity: Tensor, values: Tensor) -> Tensor:
        """Means of values ([b, n, width]) by similarities ([b, heads, m, n]): [b, m, width]."""
        mixed = similarity.softmax(-1) @ self._split(values)
        return mixed.transpose(1, 2).flatten(2)


def _silent(linear: nn.Linear) -> nn.Linear:
    """A projection that adds nothing until it is trained."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
