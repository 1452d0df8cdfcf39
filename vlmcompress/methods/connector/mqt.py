"""MQT: the first k of a row of nested queries attend to the image (arXiv 2405.19315)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.core.tokens import Segment, VisualTokens
from vlmcompress.methods.celled import whole_map
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.ops.queries import head_count, sine_places, stand_for
from vlmcompress.methods.ops.windows import Size, as_map, as_rows
from vlmcompress.methods.options import check_count
from vlmcompress.methods.trained import ConnectorShape, LearnedCompressor


@dataclass(frozen=True)
class MQT(LearnedCompressor):
    """Matryoshka query transformer: k tokens are the first k of `max_tokens` learned queries.

    One layer of cross attention from the queries to the image, and a projection to the language
    model in place of the connector. As every step of training uses the first k queries with another
    k, one set of weights serves any count up to `max_tokens` (section 3.2); a larger budget is cut
    to it.

    To train it, draw a count per step from `training_counts` and set it:

        handle.set(keep=random.choice(method.training_counts))

    The parts do not depend on the count and stay the same. The paper warms up with all queries.

    In the released code keys are made of positions alone, so that all images are mixed by the same
    weights. That is `faithful=True`, which released files need; by default keys hold the image too,
    as the paper describes: its normalised features, with positions added. Positions are sines of
    the place in a square table of `max_tokens` places. `faithful` interpolates that table
    bicubically to other maps; by default the sines themselves are taken at the places between.

    A row stands for no place: see `stand_for`. It needs training: untrained, rows are drawn by
    `seed`. Names in released files were checked against the list `layouts/mqt.json`.

    Attributes:
        max_tokens: queries, a square number.
        head_width: channels per head of attention, at least.
        faithful: keys as in the released code.
    """

    name: ClassVar[str] = "mqt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.19315"
    gives: ClassVar[Literal["tower", "llm"]] = "llm"
    placeless: ClassVar[bool] = True
    max_tokens: int = 256
    head_width: int = 64
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_count(self.name, "max_tokens", self.max_tokens)
        check_count(self.name, "head_width", self.head_width)
        if math.isqrt(self.max_tokens) ** 2 != self.max_tokens:
            raise ConfigError(
                f"mqt's max_tokens is {self.max_tokens}; it must be a square number, such as "
                f"{math.isqrt(self.max_tokens) ** 2}, since queries share a square of positions."
            )
        if self.tokens is not None and self.tokens > self.max_tokens:
            raise ConfigError(
                f"mqt's tokens is {self.tokens}; there are {self.max_tokens} queries. Give fewer, "
                "or a larger max_tokens."
            )
        if not isinstance(self.faithful, bool):
            raise ConfigTypeError(f"mqt's faithful is {self.faithful!r}; it must be True or False.")

    @property
    def training_counts(self) -> range:
        """The counts that training draws from, as published: every second up to `max_tokens`."""
        return range(min(2, self.max_tokens), self.max_tokens + 1, 2)

    def tokens_kept(self, segments: Sequence[Segment], keep: float | int) -> int:
        """The count asked for, at most `max_tokens`."""
        return min(self.max_tokens, super().tokens_kept(segments, keep))

    def parts(self, shape: ConnectorShape) -> Queries:
        """Queries, attention and the projection to the language model."""
        heads = head_count(shape.width, self.head_width)

        def make() -> Queries:
            return Queries(shape.width, shape.out, self.max_tokens, heads, self.faithful)

        return fresh(make, self.seed, self.weights)

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """One row per query, in the space of the language model.

        Raises:
            ConfigError: when an earlier method dropped or merged tokens.
            EvidenceError: without trained parts.
        """
        size = whole_map(self.name, tokens)
        queries = required(tokens.parts, Queries, "connector")
        with torch.autocast(tokens.features.device.type, enabled=False):
            made, weights = queries(tokens.features, size, self.budget(tokens, keep))
        return tokens.regroup(made.to(tokens.features.dtype), *stand_for(weights.detach()))


class Queries(Learned):
    """Learned queries attend to an image. Names are those of released files.

    Args:
        width: of the tower's states.
        out: of the language model's rows.
        queries: a square number.
        heads: of the attention.
        faithful: whether keys are made of positions alone.
    """

    pos_embed: Tensor

    def __init__(self, width: int, out: int, queries: int, heads: int, faithful: bool) -> None:
        keys = "positions" if faithful else "content"
        super().__init__(
            method="mqt", width=width, out=out, max_tokens=queries, heads=heads, keys=keys
        )
        norm = partial(nn.LayerNorm, width, eps=1e-6)
        self.faithful = faithful
        self.table = (math.isqrt(queries), math.isqrt(queries))
        self.register_buffer("pos_embed", sine_places(self.table, self.table, width))
        self.query = nn.Parameter(torch.empty(queries, width))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q, self.ln_k, self.ln_v = norm(), norm(), norm()
        self.proj = nn.Parameter(torch.randn(width, out) * out**-0.5)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, x: Tensor, size: Size, k: int) -> tuple[Tensor, Tensor]:
        """Rows of the first k queries, [b, k, out], and their attention, [b, k, n], in float32.

        Args:
            x: [b, n, width].
            size: (h, w) of the map, n = h * w.
            k: at most the number of queries.
        """
        x = x.float()
        q = self.ln_q(self.query[:k] + self.pos_embed[:k])
        mixed, weights = self.attn(
            q.expand(len(x), -1, -1), self._keys(x, size), self.ln_v(x), need_weights=True
        )
        return mixed @ self.proj, weights

    def _keys(self, x: Tensor, size: Size) -> Tensor:
        if self.faithful:
            table = as_map(self.pos_embed[None], self.table)
            keys: Tensor = self.ln_k(as_rows(interpolate(table, size=size, mode="bicubic")))
            return keys.expand(len(x), -1, -1)
        places = sine_places(size, self.table, x.shape[-1]).to(x.device)
        normed: Tensor = self.ln_k(x)
        return normed + places
