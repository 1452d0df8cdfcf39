"""TopV: tokens ranked by optimal transport between a layer's input and output, without attention.

https://arxiv.org/abs/2503.18278
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmcompress.core.errors import ConfigError, EvidenceError
from vlmcompress.methods.base import Layer
from vlmcompress.methods.decoder.attending import packed
from vlmcompress.methods.decoder.base import DecoderState, LayerReducer, Reads, Reduction, best
from vlmcompress.methods.decoder.schedule import Scheduled
from vlmcompress.methods.ops.transport import shares_sent
from vlmcompress.methods.options import check_count, check_number, check_share


@dataclass(frozen=True)
class TopV(Scheduled, LayerReducer):
    """Before layer K: how much of what layer K - 1 puts out comes from a token of its input.

    Sources are the visual rows that enter layer K - 1 and targets those that leave it. The cost of
    a pair is what their features differ by (1 - cosine), plus how far apart they lie in the image,
    plus how far the source lies from its centre, distances as shares of the diagonal. A token's
    importance is what it sends under the cheapest plan by which every target receives the same.
    Part of the budget goes to an even sample of the tokens that would have been dropped.

    There is no released code, and of the paper only the outline could be verified: the three
    terms, Sinkhorn's iterations, even recovery, one drop at layer 2. Ours are the weights, the
    targets (the paper takes rows behind a norm of the layer; here they are the layer's output), and
    a source side that is relaxed: under the usual plan all tokens would send the same. Images are
    transported apart from each other; time and memory grow with the square of their tokens.

    Attributes:
        layers: K; the paper's 2 of 32.
        spatial: weight of the distance in the image.
        central: weight of the distance to the centre.
        smoothing: of the plan, in units of cost.
        strictness: how much sources are held to equal shares, in units of cost.
        iterations: of Sinkhorn's algorithm.
        recovered: share of the budget that is sampled evenly, rounded down to whole tokens.
    """

    name: ClassVar[str] = "topv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.18278"
    reads: ClassVar[Reads] = "features"
    repeatable: ClassVar[bool] = True
    layers: tuple[Layer, ...] = (2 / 32,)
    spatial: float = 1.0
    central: float = 1.0
    smoothing: float = 0.1
    strictness: float = 0.1
    iterations: int = 20
    recovered: float = 0.1

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name in ("spatial", "central", "smoothing", "strictness"):
            check_number(self.name, name, getattr(self, name), 0, 1e6)
        if self.smoothing == 0:
            raise ConfigError(f"{self.name}'s smoothing is 0; it must be positive.")
        check_count(self.name, "iterations", self.iterations)
        check_share(self.name, "recovered", self.recovered)

    def reduce(self, site: int, state: DecoderState, k: Tensor) -> Reduction:
        """Keep the most important, and an even sample of the others."""
        k = torch.minimum(k.to(state.visual.device), state.visual.sum(1))
        sampled = (k.double() * self.recovered).long()
        first = best(self.importance(state), state.visual, k - sampled)
        return Reduction(first | evenly(state.visual & ~first, sampled))

    @torch.no_grad()
    def importance(self, state: DecoderState) -> Tensor:
        """[B, L] what each visual row sends, 0 for text.

        Raises:
            EvidenceError: when the rows before the layer were not read.
        """
        if state.earlier is None:
            raise EvidenceError("topv needs the rows before a layer; none were read.")
        rows, there = packed(state.visual)
        unit = state.unit.gather(1, rows)
        pairs = (unit[:, :, None] == unit[:, None]) & there[:, :, None] & there[:, None]
        before, after = (
            normalize(_taken(x, rows).float(), dim=-1) for x in (state.earlier, state.hidden)
        )
        place, grid = (_taken(x, rows).float() for x in (state.place, state.grid))
        diagonal = grid.norm(dim=-1)
        apart = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")
        centre = (place - (grid - 1) / 2).norm(dim=-1)
        cost = (
            (1 - before @ after.transpose(1, 2))
            + self.spatial * apart / diagonal[:, :, None]
            + self.central * (centre / diagonal)[:, :, None]
        )
        sent = shares_sent(
            cost,
            pairs,
            smoothing=self.smoothing,
            strictness=self.strictness,
            iterations=self.iterations,
        )
        return torch.zeros(state.visual.shape, device=sent.device).scatter(1, rows, sent * there)


def evenly(among: Tensor, k: Tensor) -> Tensor:
    """The middles of `k` equal runs of the rows that a mask names: [B, L] bool.

    Args:
        among: [B, L] bool.
        k: [B] int64, at most as many as are named.
    """
    n = among.sum(1, keepdim=True)
    turn = among.long().cumsum(1) - 1
    k = k.to(among.device)[:, None]
    # Of the n rows named, row t is the middle of a run when (2 i + 1) n // (2 k) = t for some i.
    run = (2 * turn * k + k) // (2 * n.clamp(min=1))
    first = ((2 * run + 1) * n) // (2 * k.clamp(min=1))
    return among & (k > 0) & (first == turn)


def _taken(values: Tensor, rows: Tensor) -> Tensor:
    """Rows ([B, r]) of [B, L, d]."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))
