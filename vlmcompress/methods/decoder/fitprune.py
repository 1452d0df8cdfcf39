"""FitPrune: every layer drops what the next would hardly miss, by a schedule fitted beforehand.

https://arxiv.org/abs/2409.10197
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.methods.decoder.attending import received
from vlmcompress.methods.decoder.base import DecoderState, LayerPruner, Reads, Site
from vlmcompress.methods.decoder.schedule import keep_of_average
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.options import check_number


@dataclass(frozen=True)
class FitPrune(LayerPruner):
    """In each layer, between attention and MLP, drop tokens that receive little attention.

    A token's score is the product of what it receives from visual rows and from the text behind
    the images, in that layer's own attention, each the sum over rows of the maximum over heads.
    Position ids are kept. How many go in which layer is fitted offline to a model and a budget by
    `vlmcompress calibrate fitprune`; without such a schedule, the same share goes in every layer.

    The released code holds tables for LLaVA-1.5-7B only. It takes the whole attention map of every
    layer; here it is summed up some rows at a time, in memory that grows with the rows' number and
    time that grows with its square.

    Attributes:
        schedule: share of the visual tokens left behind each layer, or the JSON file that the
            command has written, which is read once.
        average_keep: in place of `keep` and a schedule, the mean over all layers of the share of
            tokens that go through a layer's attention.
    """

    name: ClassVar[str] = "fitprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.10197"
    reads: ClassVar[Reads] = "own"
    schedule: tuple[float, ...] | str | None = None
    average_keep: float | None = None

    def __post_init__(self) -> None:
        """Check the options, and read the schedule."""
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", read_schedule(Path(self.schedule)))
        if self.schedule is not None:
            _check_schedule(self.schedule)
        if self.average_keep is None:
            return
        check_number(self.name, "average_keep", self.average_keep, 0, 1)
        if self.average_keep == 0:
            raise ConfigError(f"{self.name}'s average_keep is 0; it must be in (0, 1].")
        if self.schedule is not None:
            raise ConfigError(f"{self.name} has schedule and average_keep; give one of them.")

    @property
    def own_budget(self) -> bool:
        """With a schedule or `average_keep`."""
        return self.schedule is not None or self.average_keep is not None

    def sites(self, depth: int) -> tuple[Site, ...]:
        """In every layer.

        Raises:
            ConfigError: for a schedule of another depth.
        """
        if self.schedule is not None and len(self.schedule) != depth:
            raise ConfigError(
                f"{self.name}'s schedule is for {len(self.schedule)} layers and this model has "
                f"{depth}; calibrate one for it with `vlmcompress calibrate fitprune`."
            )
        return tuple(Site(layer, "between") for layer in range(depth))

    def counts(self, n: int, keep: float | int | None, depth: int) -> tuple[int, ...]:
        """By the schedule, or geometric."""
        sites = self.sites(depth)
        if self.schedule is not None:
            left: Sequence[float] = self.schedule  # type: ignore[assignment]  # read at creation
            return tuple(keeping.count(float(share), n) for share in left)
        if self.average_keep is None:
            return tuple(schedules.geometric(n, self.final(n, keep), depth))

        def shares(last: float) -> list[float]:
            return [last ** ((i + 1) / depth) for i in range(depth)]

        last = keep_of_average(self.name, self.average_keep, sites, depth, shares)
        return tuple(keeping.count(share, n) for share in shares(last))

    def score(self, state: DecoderState) -> Tensor:
        """[B, L] attention received from visual rows times that from text behind them."""
        return received(state, state.visual) * received(state, state.text)


def read_schedule(path: Path) -> tuple[float, ...]:
    """The shares of a schedule that `vlmcompress calibrate fitprune` has written.

    Raises:
        ConfigError: when there is none in the file.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        return tuple(data["left"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no schedule of fitprune ({type(error).__name__}: {error}); write one "
            "with `vlmcompress calibrate fitprune`."
        ) from error


def _check_schedule(schedule: object) -> None:
    if not isinstance(schedule, tuple) or not schedule:
        raise ConfigTypeError(
            f"fitprune's schedule is {schedule!r}; it must be a tuple with one share per layer, or "
            "the path of a schedule."
        )
    for share in schedule:
        check_number("fitprune", "schedule", share, 0, 1)
    grows = any(late > early for early, late in pairwise((1.0, *schedule)))
    if grows or schedule[-1] == 0:
        raise ConfigError(
            f"fitprune's schedule is {list(schedule)}; shares must lie in (0, 1] and not grow."
        )
