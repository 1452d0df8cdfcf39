"""Token clustering: blocks in the middle see clusters of patches (arXiv 2210.01035)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.methods.ops import clustering, grid, schedules
from vlmcompress.methods.options import Layer, check_count, check_layers, check_number
from vlmcompress.methods.tower.base import Place, TowerReducer, TowerState, layers_within

#: Of the scatter within cells: of a thousandth to all of it, what rebuilt patches of the reference
#: model best.
_SHARE = 0.1
#: Where cells are flat, so that nothing is divided by 0.
_LEAST = 1e-20


@dataclass(frozen=True)
class TokenClustering(TowerReducer):
    """After one block patches gather in clusters; after a later one all patches are made again.

    Clustering: centres begin as the means of the cells of a grid; in turn, patches are drawn to
    the centres of the cells around their own, by the softmax of their squared distances, and
    centres become the means of what is drawn to them (token clustering layer, §3). The blocks in
    between run on the centres. Reconstruction: each patch is the mean of the refined clusters
    whose centres, as they were, lay nearest to the patch as it was, weighted by the same softmax
    (token reconstruction layer, §3).

    All patches leave the tower, in their places: `keep` is the share, or the number, that the
    blocks in between see. With `reconstruct=False` the clusters themselves go on, and `keep` is
    what leaves the tower, as with other methods. Either way the number is that of the grid of at
    most as many cells that is nearest to a square (24 x 24 patches, keep=0.1: 7 x 8 = 56). A
    cluster is named by the patch in the middle of its cell; every other patch belongs to the
    nearest.

    Both layers were checked against the released code. Its weights of the reconstruction have the
    Euclidean length 1, so that their sum, and with it the states, grow with the number of
    neighbours; here their sum is 1, and `faithful=True` follows the released code. Its clusters
    that nothing is drawn to become 0; here they stay where they were. Its temperature is a number
    that was found for each model, from 1 to 200; the default here is a tenth of the mean squared
    distance of an image's patches to the means of their cells, whatever the scale of the tower's
    states. Window, iterations and neighbours are those it was released with for plain ViTs, and
    the share of the depth is that of the paper's 24-layer towers, from memory.

    Attributes:
        layer: the block after which patches gather.
        until: the block after which they are made again; the last whose output is read when not
            given.
        reconstruct: whether they are.
        window: cells either way that a patch may be drawn to, an odd number.
        iterations: how often patches choose and centres follow.
        temperature: that squared distances are divided by; from the image when not given.
        neighbours: clusters that a patch is made of.
        faithful: whether the weights of these have the Euclidean length 1 instead of the sum 1.
    """

    name: ClassVar[str] = "token_clustering"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.01035"
    layer: Layer = 0.4
    until: Layer | None = None
    reconstruct: bool = True
    window: int = 5
    iterations: int = 5
    temperature: float | None = None
    neighbours: int = 20
    faithful: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, (self.layer,))
        if self.until is not None:
            check_layers(self.name, (self.until,))
        for name in ("window", "iterations", "neighbours"):
            check_count(self.name, name, getattr(self, name))
        if self.window % 2 == 0:
            raise ConfigError(f"{self.name}'s window is {self.window}; it must be odd.")
        if self.temperature is not None:
            check_number(self.name, "temperature", self.temperature, 0, 1e9)
        if self.temperature == 0:
            raise ConfigError(f"{self.name}'s temperature is 0; it must be above.")
        for name in ("reconstruct", "faithful"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigTypeError(
                    f"{self.name}'s {name} is {getattr(self, name)!r}; it must be True or False."
                )
        if not self.reconstruct and (self.until is not None or self.faithful):
            raise ConfigError(
                f"{self.name}: until and faithful are about the reconstruction, which "
                "reconstruct=False leaves out; leave them out, too."
            )

    @property
    def place(self) -> Place:
        """After the block."""
        return "after"

    def tokens_kept(self, n: int, keep: float | int) -> int:
        """Clusters: cells of the grid of at most as many as asked for, nearest to a square.

        Raises:
            ConfigError: for patches that form no square.
        """
        side, k = grid.side_of(self.name, n), keeping.count(keep, n)
        return math.prod(grid.nearest_grid((1, side, side), k))

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """Clusters after `layer`, and all patches again after `until`."""
        (first,) = layers_within(self.name, (self.layer,), depth, last)
        k = self.final(n, keep)
        if not self.reconstruct:
            return schedules.at_layers(n, (first,), (k,), last + 1)
        until = last if self.until is None else self.until
        (again,) = layers_within(self.name, (until,), depth, last)
        if again <= first:
            raise ConfigError(
                f"{self.name} gathers patches after layer {first} and makes them again after "
                f"layer {again}, so that no block runs on the clusters; choose an earlier layer "
                "or a later until."
            )
        return schedules.at_layers(n, (first, again), (k, n), last + 1)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Gather the patches in `k` clusters."""
        first, side = state.cls_rows, grid.side_of(self.name, state.patches)
        cells = grid.squarest(side, k)
        patches = state.hidden[:, first:].float()
        as_map = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
        temperature = self._temperature(as_map, cells)
        centres = clustering.local_clusters(
            as_map,
            cells,
            window=self.window,
            iterations=self.iterations,
            temperature=temperature,
        )
        with torch.no_grad():
            distances = _distances(patches, centres)
        named, owner = _named(distances, side, cells)
        cls = torch.arange(first, device=owner.device).expand(len(owner), -1)
        rows = torch.cat([cls, (named + first).expand(len(owner), -1)], 1)
        hidden = torch.cat([state.hidden[:, :first], centres.to(state.hidden.dtype)], 1)
        short = state.regroup(hidden, rows, torch.cat([cls, owner + first], 1))
        return dataclasses.replace(short, recipe=self._recipe(distances, temperature))

    def _temperature(self, patches: Tensor, cells: tuple[int, int]) -> float | Tensor:
        if self.temperature is not None:
            return self.temperature
        scatter = clustering.scatter_in_cells(patches, cells)
        return (_SHARE * scatter).clamp(min=_LEAST)[:, None, None]

    def _recipe(self, distances: Tensor, temperature: float | Tensor) -> Tensor | None:
        if not self.reconstruct:
            return None
        return clustering.nearest_weights(
            distances, self.neighbours, temperature, unit_length=self.faithful
        )


def _distances(patches: Tensor, centres: Tensor) -> Tensor:
    with torch.autocast(patches.device.type, enabled=False):
        return clustering.squared_distances(patches, centres)


def _named(distances: Tensor, side: int, cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The patch in the middle of each cell, [k], and the cluster of each patch, [b, n]."""
    rows, columns = (_middles(side, count) for count in cells)
    named = torch.tensor([r * side + c for r in rows for c in columns], device=distances.device)
    own = torch.arange(len(named), device=distances.device).expand(len(distances), -1)
    owner = distances.argmin(2)
    return named, owner.scatter(1, named.expand(len(owner), -1), own)


def _middles(side: int, cells: int) -> list[int]:
    """Of the places that lie in each cell along one side, the middle one."""
    starts = [-(-i * side // cells) for i in range(cells + 1)]
    return [(start + end - 1) // 2 for start, end in pairwise(starts)]
