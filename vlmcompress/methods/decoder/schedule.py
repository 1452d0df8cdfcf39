"""Schedules: how many visual tokens are left behind each site inside the LLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.base import Layer
from vlmcompress.methods.decoder.base import LayerReducer, Site, sites_before
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.options import check_layers, check_number


@dataclass(frozen=True)
class Scheduled(LayerReducer):
    """Drops before some layers, the same share at each of them, so that `keep` leaves the last.

    Attributes:
        layers: before which tokens are dropped, ascending; shares of depth count from layer 1 on.
        average_keep: in place of `keep`, the mean over all layers of the share of tokens that go
            through a layer's attention.
    """

    layers: tuple[Layer, ...] = (0.25, 0.5, 0.75)
    average_keep: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, self.layers)
        if self.average_keep is not None:
            check_number(self.name, "average_keep", self.average_keep, 0, 1)
            if self.average_keep == 0:
                raise ConfigError(f"{self.name}'s average_keep is 0; it must be in (0, 1].")

    @property
    def own_budget(self) -> bool:
        """With `average_keep`."""
        return self.average_keep is not None

    def sites(self, depth: int) -> tuple[Site, ...]:
        """Before each of the layers."""
        return sites_before(self.name, self.layers, depth)

    def counts(self, n: int, keep: float | int | None, depth: int) -> tuple[int, ...]:
        """Geometric: every site leaves the same share of what the one before left."""
        steps = len(self.layers)
        if self.average_keep is None:
            return tuple(schedules.geometric(n, self.final(n, keep), steps))
        sites = self.sites(depth)
        share = keep_of_average(self.name, self.average_keep, sites, depth, self._shares)
        return tuple(keeping.count(s, n) for s in self._shares(share))

    def _shares(self, keep: float) -> list[float]:
        steps = len(self.layers)
        return [keep ** ((i + 1) / steps) for i in range(steps)]


def keep_of_average(
    method: str,
    average: float,
    sites: Sequence[Site],
    depth: int,
    shares: Callable[[float], Sequence[float]],
) -> float:
    """The share behind the last site that makes the mean over layers what is wanted.

    Args:
        method: name for messages.
        average: wanted mean over layers of the share that goes through attention.
        sites: where tokens are dropped.
        depth: layers.
        shares: shares behind each site from the one behind the last, growing with it.

    Raises:
        ConfigError: when even dropping everything at the sites leaves more.
    """
    least = average_share([0.0] * len(sites), sites, depth)
    if average <= least:
        raise ConfigError(
            f"{method}'s average_keep is {average}, and the layers before its first site alone "
            f"make {least:.3f} of {depth} layers; keep more or drop earlier."
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if average_share(shares(middle), sites, depth) < average:
            low = middle
        else:
            high = middle
    return high


def average_share(left: Sequence[float], sites: Sequence[Site], depth: int) -> float:
    """Mean over layers of the share of tokens that goes through a layer's attention.

    Args:
        left: share left behind each site.
        sites: in the order of depth.
        depth: layers.
    """
    now, total, after = 1.0, 0.0, dict(zip(sites, left, strict=True))
    for layer in range(depth):
        now = after.get(Site(layer), now)
        total += now
        now = after.get(Site(layer, "between"), now)
    return total / depth
