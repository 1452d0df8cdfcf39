"""What the Pareto front is made of: settings inside the tower, methods after it, budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from eval_harness.pareto_rounds import Timing
from eval_harness.shapes import config
from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError
from vlmcompress.methods import pipeline, registry
from vlmcompress.methods.inside import names_inside
from vlmcompress.reference.worlds import WORLDS

TOWERS = (
    "",
    "evit(layers=(0.125,)):0.5",
    "evit(layers=(0.25,)):0.5",
    "evit(layers=(0.25,)):0.33",
    "evit(layers=(0.5,)):0.33",
    "evit:0.35",
    "tome_tower:0.35",
    "tome_tower(layers=(0.25, 0.33)):0.33",
    "pitome_tower(layers=(0.25, 0.33)):0.33",
)
"""Settings inside the tower; empty for none. One layer early or late, or spread over the depth."""

CONNECTORS = ("vtc_cls", "divprune")

PUBLISHED: Mapping[str, str] = {
    "evit": "evit(rate=0.7)",  # the keep rate its README evaluates
    "tome_tower": "tome_tower(r=23)",  # its README: ViT-L/16 of 576 patches
    "pitome_tower": "pitome_tower(ratio=0.95)",  # its README, for ViTs and for CLIP
    "mctf": "mctf(r=16)",  # its README, for 196 patches
}
"""Settings inside the tower that papers evaluate; methods without any are timed at `_SHARE`."""

_SHARE = 0.5


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        questions: {world: questions, all kinds alike}.
        towers: settings inside the tower; empty for none, which is always measured.
        connectors: methods after it.
        keeps: share of an image's tokens that reaches the language model.
        timing: on what times are taken.
        rounds: of timings.
        split: where questions come from.
    """

    questions: dict[str, int]
    towers: tuple[str, ...] = TOWERS
    connectors: tuple[str, ...] = CONNECTORS
    keeps: tuple[float, ...] = (0.1,)
    timing: Timing = field(default_factory=Timing)
    rounds: int = 5
    split: str = "test"

    def __post_init__(self) -> None:
        """Check what is asked for, before anything is measured.

        Raises:
            ConfigError: for an unknown world, a keep that is no share, or no rounds.
            UnknownMethodError: for an unknown method.
        """
        unknown = set(self.questions) - set(WORLDS)
        if unknown or not self.questions:
            raise ConfigError(f"worlds {sorted(unknown)}: give some of {', '.join(WORLDS)}.")
        wrong = [keep for keep in self.keeps if not isinstance(keep, float) or not 0 < keep < 1]
        if wrong or not self.keeps:
            raise ConfigError(
                f"keeps are {self.keeps!r}; they must be shares in (0, 1), since the timed model "
                "and the reference model have different numbers of tokens."
            )
        if self.rounds < 1:
            raise ConfigError(f"rounds is {self.rounds!r}; it must be at least 1.")
        for point in self.points():
            pipeline.build(point.spec, self.tokens(point.keep))

    def tokens(self, keep: float) -> int:
        """Tokens of an image of the timed model that `keep` leaves."""
        return keeping.count(keep, int(config(self.timing.shape).image_seq_length))

    def points(self) -> list[Point]:
        """Every combination; at each keep those without a tower setting come first."""
        towers = ("", *(tower for tower in self.towers if tower))
        return [
            Point(tower, connector, keep)
            for keep in self.keeps
            for tower in towers
            for connector in self.connectors
        ]


@dataclass(frozen=True)
class Point:
    """A setting inside the tower with a method after it."""

    tower: str
    connector: str
    keep: float

    @property
    def spec(self) -> str:
        """The pipeline; its last stage has no budget."""
        return f"{self.tower} | {self.connector}" if self.tower else self.connector


def published() -> dict[str, str]:
    """{method inside the tower: a spec with its published setting, or half of the patches}."""
    inside = names_inside(cls=True)
    names = [name for name in registry.BUILTIN if name in inside]
    return {name: PUBLISHED.get(name, f"{name}:{_SHARE}") for name in names}
