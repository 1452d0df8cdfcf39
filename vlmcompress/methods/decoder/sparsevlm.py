"""SparseVLM: tokens that the text's visual words look at, the rest recycled in clusters.

https://arxiv.org/abs/2410.04417
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError, EvidenceError
from vlmcompress.methods.base import CountKind, Layer
from vlmcompress.methods.decoder.attending import in_blocks, mean_over_heads, packed
from vlmcompress.methods.decoder.base import (
    DecoderState,
    LayerReducer,
    Positions,
    Reads,
    Reduction,
    best,
)
from vlmcompress.methods.decoder.recycling import Recycling
from vlmcompress.methods.decoder.schedule import Scheduled
from vlmcompress.methods.options import check_choice, check_count, check_number, check_share

#: Tokens that stay at the three sites, by the mean over layers that they are named after.
TABLES = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@dataclass(frozen=True)
class SparseVLM(Scheduled, LayerReducer):
    """Rank by the attention of raters, and merge the best of what goes instead of losing it.

    Raters are the text rows behind the images that match the visual rows better than the mean text
    row does, in the embeddings before layer 0 (§3.2, Eq. 5). A token's score is their attention in
    the layer before the site, averaged over heads and raters. The best of the dropped form a pool,
    which is clustered around its peaks of density; each cluster goes on as one row behind the kept
    visual tokens (§3.4), and budgets count these rows, too. Released codes add noise to tied
    densities; here the earlier one wins. Where no text row is above the mean, all are raters;
    without text behind the images, the last row is.

    The paper derives the number dropped at a site from the rank of the attention between raters
    and visual tokens; released codes keep `rank * scale + bias`, and later ones use tables. The
    tables were found for 576 tokens; what a shorter prompt has less than them loses nothing.

    Attributes:
        layers: before which tokens are dropped; the released code looks at layers 2, 6 and 15 of
            32 and drops behind them.
        version: 1 merges and counts positions anew; 2 (SparseVLM+) neither merges nor renumbers
            and listens to some `heads` only. Its correction of the attention map for the pull of
            rotary positions is left out: it needs their angles, which a kernel does not see.
        table: tokens kept at each site: 192, 128, 96 or 64 for a published one, or counts of one's
            own; merged rows come on top.
        rank: (scale, bias) of the rule above in place of a table. At most one token per rater is
            kept without them, so that short questions prune hard.
        heads: how many heads version 2 listens to, or which share; the released 14 of 32.
        recycled: share of the dropped that is pooled.
        per_cluster: pooled tokens per cluster.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04417"
    reads: ClassVar[Reads] = "previous"
    reads_embedded: ClassVar[bool] = True
    layers: tuple[Layer, ...] = (3 / 32, 7 / 32, 16 / 32)
    version: int = 1
    table: int | tuple[int, ...] | None = None
    rank: tuple[float, float] | None = None
    heads: int | float = 14 / 32
    recycled: float = 0.3
    per_cluster: int = 10

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice(self.name, "version", self.version, tuple(TABLES))
        check_share(self.name, "recycled", self.recycled)
        check_count(self.name, "per_cluster", self.per_cluster)
        if isinstance(keeping.parse_keep(self.heads), keeping.AutoKeep):
            raise ConfigError(f"{self.name}'s heads is 'auto'; give a count or a share.")
        budgets = {n: getattr(self, n) for n in ("table", "rank", "average_keep")}
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{self.name} has {' and '.join(given)}; one says what stays.")
        if self.table is not None:
            self._check_table(self._table())
        if self.rank is not None:
            self._check_rank(self.rank)

    def _check_table(self, table: tuple[int, ...]) -> None:
        if len(table) != len(self.layers):
            raise ConfigError(
                f"{self.name}'s table {list(table)} has {len(table)} counts for "
                f"{len(self.layers)} layers; give one per layer."
            )
        for count in table:
            check_count(self.name, "table", count)
        if list(table) != sorted(table, reverse=True):
            raise ConfigError(f"{self.name}'s table is {list(table)}; counts must not grow.")

    def _check_rank(self, rank: object) -> None:
        if not isinstance(rank, tuple) or len(rank) != 2:
            raise ConfigError(f"{self.name}'s rank is {rank!r}; it must be (scale, bias).")
        check_number(self.name, "rank scale", rank[0], 0, 1e6)
        check_number(self.name, "rank bias", rank[1], -1e6, 1e6)

    def _table(self) -> tuple[int, ...]:
        """Counts per site.

        Raises:
            ConfigError: for a name that no published table has.
        """
        assert self.table is not None  # asked only then
        if isinstance(self.table, tuple):
            return self.table
        published = TABLES[self.version]
        check_choice(self.name, "table", self.table, tuple(published))
        return published[self.table]

    @property
    def own_budget(self) -> bool:
        """With a table, the rank rule or `average_keep`."""
        return self.table is not None or self.rank is not None or super().own_budget

    @property
    def count_kind(self) -> CountKind:  # type: ignore[override]
        """By content with the rank rule."""
        return "exact" if self.rank is None else "content"

    @property
    def renumbers(self) -> Positions:  # type: ignore[override]
        """Anew in version 1."""
        return "contiguous" if self.version == 1 else "original"

    @property
    def merges(self) -> bool:  # type: ignore[override]
        """In version 1, unless nothing is recycled."""
        return self.version == 1 and self.recycled > 0

    @property
    def recycling(self) -> Recycling:
        """How many rows the dropped become."""
        return Recycling(self.recycled if self.merges else 0.0, self.per_cluster)

    def counts(self, n: int, keep: float | int | None, depth: int) -> tuple[int, ...]:
        """Kept and merged rows; with the rank rule, the most there can be."""
        if self.table is None and self.rank is None:
            return super().counts(n, keep, depth)
        left = []
        for count in self._table() if self.table is not None else [n] * len(self.layers):
            kept = _one_less(count, n)
            n = kept + self.recycling.clusters(n - kept)
            left.append(n)
        return tuple(left)

    def reduce(self, site: int, state: DecoderState, k: Tensor) -> Reduction:
        """Keep the best, merge the best of the others."""
        raters = state.notes
        if raters is None:
            raters = text_raters(state)
        rows, there = packed(_asked(raters.bool(), state))
        scores = self.score(state, rows, there)
        n, allowed = state.visual.sum(1).tolist(), k.tolist()
        kept = self._kept(site, state, (rows, there), n, allowed)
        keep = best(scores, state.visual, torch.tensor(kept))
        if not self.merges:
            return Reduction(keep, notes=raters)
        clusters = [
            self.recycling.clusters(a - b) if self.rank is not None else min(a, c) - b
            for a, b, c in zip(n, kept, allowed, strict=True)
        ]
        merged = self.recycling.merge(state.hidden, scores, state.visual & ~keep, clusters)
        return Reduction(
            keep, merged=merged.rows, merged_valid=merged.valid, source=merged.source, notes=raters
        )

    def score(self, state: DecoderState, rows: Tensor, there: Tensor) -> Tensor:
        """[B, L] attention of the raters ([B, r], those that are `there`)."""
        heads, length = state.attended().q.shape[1:3]
        total = torch.zeros(len(rows), heads, length, device=rows.device)
        for block, weights in in_blocks(state.attended(), rows):
            total += (weights * there[:, None, block, None]).sum(2)
        total = total / there.sum(1)[:, None, None]
        if self.version == 1:
            return total.mean(1)
        loud = (total * state.visual[:, None]).sum(2)
        chosen = best(loud, torch.ones_like(loud, dtype=torch.bool), self._listened(loud))
        return (total * chosen[..., None]).sum(1)

    def _listened(self, loud: Tensor) -> Tensor:
        count = keeping.count(self.heads, loud.shape[1])
        return torch.full((len(loud),), count, device=loud.device)

    def _kept(
        self,
        site: int,
        state: DecoderState,
        raters: tuple[Tensor, Tensor],
        n: list[int],
        allowed: list[int],
    ) -> list[int]:
        """Visual rows of each sample that stay themselves."""
        if self.rank is not None:
            scale, bias = self.rank
            ranks = ranks_of(state, *raters)
            return [
                a if r == a else _one_less(int(r * scale + bias), a)
                for a, r in zip(n, ranks, strict=True)
            ]
        if self.table is not None:
            # Samples with less than the table names have nothing to lose.
            count = self._table()[site]
            return [
                min(a, _one_less(count, a)) if a > b else a for a, b in zip(n, allowed, strict=True)
            ]
        return [self.recycling.kept(a, min(a, b)) for a, b in zip(n, allowed, strict=True)]


def _one_less(count: int, n: int) -> int:
    """`count`, but one less than all of n at most, and one at least where there is one."""
    return min(n, max(1, min(count, n - 1)))


@torch.no_grad()
def text_raters(state: DecoderState) -> Tensor:
    """Text rows that match the visual ones better than the mean text row: [B, L] bool.

    Raises:
        EvidenceError: when the embeddings were not read.
    """
    if state.embedded is None:
        raise EvidenceError("sparsevlm needs the rows before layer 0; none were read.")
    (text, words), (visual, there) = packed(state.text), packed(state.visual)
    width = state.embedded.shape[-1]
    t, v = (
        state.embedded.gather(1, rows[..., None].expand(-1, -1, width)).float()
        for rows in (text, visual)
    )
    match = (v @ t.transpose(1, 2)).masked_fill(~words[:, None], -torch.inf).softmax(2)
    match = (match * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
    match = match.nan_to_num() * words
    above = match > match.sum(1, keepdim=True) / words.sum(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(state.text).scatter(1, text, above & words)


def _asked(raters: Tensor, state: DecoderState) -> Tensor:
    """[B, L] bool, the raters; all text where there are none, else the last row."""
    rows = torch.arange(raters.shape[1], device=raters.device)
    asked = torch.where(raters.any(1, keepdim=True), raters, state.text)
    return torch.where(asked.any(1, keepdim=True), asked, rows == state.last)


def ranks_of(state: DecoderState, rows: Tensor, there: Tensor) -> list[int]:
    """Rank of each sample's attention between raters and visual rows, averaged over heads."""
    attention = mean_over_heads(state, rows)
    return [
        int(torch.linalg.matrix_rank(weights[asks][:, visual])) if bool(visual.any()) else 0
        for weights, asks, visual in zip(attention, there, state.visual, strict=True)
    ]
