"""Vote&Mix: tokens that most others resemble are mixed into the rest (arXiv 2408.17062)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import moved_to
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.ops.merging import cosine
from vlmcompress.methods.ops.topk import descending
from vlmcompress.methods.options import Layer, check_layers, check_number
from vlmcompress.methods.tower.base import TowerReducer, TowerState, layers_within


@dataclass(frozen=True)
class VoMix(TowerReducer):
    """In every block the most homogeneous patches are mixed into all others.

    Vote: each patch gives its vote to the patch that is most similar to it, by the cosine of the
    block's keys, averaged over heads; a vote weighs as much as that similarity. The patches with
    the most votes are selected, the lower of equal ones. Mix: a selected patch is spread over all
    retained ones by the softmax of their similarities to it, and a retained one becomes the mean
    of itself, of weight 1, and of what is spread to it. [CLS] neither votes nor mixes.

    The paper mixes queries, and what the block's output is added to, so that only the retained
    patches attend, to the keys and values of all. Here the block attends on the model's own
    kernel and what it gives is mixed, which differs by what the softmax of a mean of queries
    differs from the mean of their softmaxes. Written from a description of the
    paper, which itself was not at hand: the temperature and the rounding are not checked, and
    there is no released code to compare with. A selected patch is counted with the retained one
    that is most similar to it.

    The same share goes in each of the layers, such that `keep` is met exactly; `r` gives the
    share itself instead, rounded down.

    Attributes:
        layers: blocks that reduce; all whose output is used when not given.
        r: share mixed away in each of them, in place of `keep`.
        temperature: that similarities are divided by; the smaller, the more of a selected patch
            goes to the retained one that is most similar.
    """

    name: ClassVar[str] = "vomix"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.17062"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    looks_at: ClassVar[tuple[str, ...]] = ("keys",)
    layers: tuple[Layer, ...] | None = None
    r: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.layers is not None:
            check_layers(self.name, self.layers)
        if self.r is not None:
            check_number(self.name, "r", self.r, 0, 1)
            if self.r == 1:
                raise ConfigError(f"{self.name}'s r is 1; it must be in [0, 1), or none are left.")
        check_number(self.name, "temperature", self.temperature, 0, 1e6)
        if self.temperature == 0:
            raise ConfigError(f"{self.name}'s temperature is 0; it must be above.")

    @property
    def own_budget(self) -> bool:
        """With `r`."""
        return self.r is not None

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """Geometric over the layers; by `r`, the published counts."""
        layers = layers_within(self.name, self.layers, depth, last)
        if self.r is None:
            k = self.final(n, keep)
            left = [max(k, m) for m in schedules.geometric(n, k, len(layers))]
        else:
            r = self.r
            left = schedules.repeated(n, len(layers), lambda now: now - int(r * now))
        return schedules.at_layers(n, layers, left, last + 1)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Mix all but `k` patches into these, which stay in their order."""
        first, x = state.cls_rows, state.hidden
        chosen, stays, similar = self._vote(state, k)
        weights = (similar / self.temperature).softmax(2)
        spread, patches = weights.transpose(1, 2), x[:, first:].float()
        moved = moved_to(stays, state.patches)
        moved = moved.scatter(1, chosen, similar.argmax(2))
        with torch.autocast(x.device.type, enabled=False):
            selected = torch.take_along_dim(patches, chosen[..., None], 1)
            # A product per image: its rows do not depend on its batch.
            added = torch.stack([w @ s for w, s in zip(spread, selected, strict=True)])
        kept = torch.take_along_dim(patches, stays[..., None], 1)
        mixed = (kept + added) / (1 + spread.sum(2, keepdim=True))
        cls = torch.arange(first, device=x.device).expand(len(x), -1)
        return state.regroup(
            torch.cat([x[:, :first], mixed.to(x.dtype)], 1),
            torch.cat([cls, stays + first], 1),
            torch.cat([cls, moved + first], 1),
        )

    @torch.no_grad()
    def _vote(self, state: TowerState, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Selected patches [b, r], retained ones [b, k], and their similarities [b, r, k]."""
        keys = state.attended().keys[:, state.cls_rows :]
        order = descending(votes(keys))
        r = order.shape[1] - k
        chosen, stays = order[:, :r], order[:, r:].sort(1).values
        one, other = (torch.take_along_dim(keys, rows[..., None], 1) for rows in (chosen, stays))
        return chosen, stays, cosine(one, other)


def votes(keys: Tensor) -> Tensor:
    """Votes that each row receives: [b, n] from [b, n, d].

    Every row votes for the other row that is most similar to it, with that similarity.
    """
    similar = cosine(keys, keys)
    similar.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    strength, choice = similar.max(2)
    number = torch.arange(keys.shape[1], device=keys.device)
    # Summed in one order, which adding at indices would not be on every device.
    return torch.where(choice[..., None] == number, strength[..., None], 0).sum(1)
