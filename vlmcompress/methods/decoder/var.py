"""VAR: attention that heads waste on sinks is given to the other visual tokens.

https://arxiv.org/abs/2503.03321
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.base import Layer
from vlmcompress.methods.decoder.editing import AttentionEditor
from vlmcompress.methods.options import check_layers, check_number, check_share, resolve_layer

#: Added to the weight of every visual key in the denominator of a share, as in the released code.
_EPSILON = 1e-6


@dataclass(frozen=True)
class VAR(AttentionEditor):
    """Visual attention redistribution.

    A sink is a row, of text or image, with an entry above tau in a massive dimension, once it is
    divided by its root mean square. A head is centred on the image, for a query, when at least
    `summ` of its attention goes to visual tokens and at most the share `rho` of that to sinks among
    them. There all sinks keep the share p of their weight, and what is freed goes to the other
    visual tokens in proportion to their weights.

    The released code names the massive dimensions of two models. Here they are those in which the
    conversation's first token exceeds tau itself, layer by layer, so that no table is needed. Rows
    of the answer can be sinks like all others.

    Attributes:
        tau: what a massive entry exceeds, in root mean squares of its row.
        rho: most of a head's visual attention that may go to sinks.
        summ: least of a head's attention that goes to visual tokens.
        p: share of their weight that sinks keep.
        layers: whose attention is edited; from the third to the last but one when not given.
    """

    name: ClassVar[str] = "var"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.03321"
    looks_at: ClassVar[str] = "attention and features of its layers"
    tau: float = 20.0
    rho: float = 0.5
    summ: float = 0.2
    p: float = 0.6
    layers: tuple[Layer, ...] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_number(self.name, "tau", self.tau, 0, math.inf)
        for option in ("rho", "summ", "p"):
            check_share(self.name, option, getattr(self, option))
        if self.layers is not None:
            check_layers(self.name, self.layers)

    def edited_layers(self, depth: int, width: int) -> tuple[int, ...]:
        """The layers named, or those from 2 to the last but one."""
        if self.tau >= math.sqrt(width):
            raise ConfigError(
                f"var's tau is {self.tau:g}, and no entry of a row of {width} exceeds "
                f"{math.sqrt(width):.1f} root mean squares, so that there can be no sink; use a "
                "smaller tau."
            )
        if self.layers is not None:
            return tuple(sorted({resolve_layer(layer, depth) for layer in self.layers}))
        if depth < 4:
            raise ConfigError(
                f"var edits the layers from 2 to the last but one, and this model has {depth}; "
                "name others: var(layers=(1,))."
            )
        return tuple(range(2, depth - 1))

    def anchor(self, first: Tensor) -> Tensor:
        """[B, d] bool, the massive dimensions."""
        return self._massive(first)

    def marks(self, hidden: Tensor, anchor: Tensor) -> Tensor:
        """Sinks."""
        return (self._massive(hidden) & anchor[:, None]).any(-1)

    def _massive(self, rows: Tensor) -> Tensor:
        rows = rows.detach().float()
        mean = rows.square().mean(-1, keepdim=True)
        return rows.square() > self.tau**2 * mean

    def edit(self, weights: Tensor, visual: Tensor, marked: Tensor) -> tuple[Tensor, Tensor]:
        """The weights redistributed; nothing changes where nothing is freed."""
        sinks, others = marked[:, None, None], (visual & ~marked)[:, None, None]
        freed = ((1 - self.p) * (weights * sinks)).sum(-1)
        room = (weights * others).sum(-1)
        changed = self.centred(weights, visual, marked) & (freed > 0) & (room > 0)
        growth = 1 + freed / room.clamp(min=torch.finfo(room.dtype).tiny)
        factor = torch.where(sinks, self.p, torch.where(others, growth[..., None], 1.0))
        return torch.where(changed[..., None], weights * factor, weights), changed

    def centred(self, weights: Tensor, visual: Tensor, sinks: Tensor) -> Tensor:
        """[B, heads, r] bool, which heads are centred on the image for which queries.

        Args:
            weights: [B, heads, r, C].
            visual: [B, C] bool.
            sinks: [B, C] bool.
        """
        total = (weights * visual[:, None, None]).sum(-1)
        wasted = (weights * (visual & sinks)[:, None, None]).sum(-1)
        share = wasted / (total + _EPSILON * visual.sum(1)[:, None, None])
        return (share <= self.rho) & (total >= self.summ)
