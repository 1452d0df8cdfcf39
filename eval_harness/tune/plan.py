"""What a run of `vlmcompress tune` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eval_harness.sweep.plan import POSITIONS
from eval_harness.sweep.tasks import TaskConfig
from eval_harness.tune.goal import Goal
from eval_harness.tune.halving import Rules
from vlmcompress.core.errors import ConfigError

TTFT, FLOPS = "ttft", "flops"
COSTS = (TTFT, FLOPS)

_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class TunePlan:
    """A search.

    Attributes:
        model: a hub id, a folder or `reference`.
        tasks: the user's questions.
        goal: what is admissible.
        space: specs of pipelines; those of the model's default space where empty.
        rules: of the search.
        held_out: share of the images that only the final test sees.
        cost: `ttft`, measured from the picture to the first token, or `flops`, by formula.
        rounds: timed rounds of a pipeline; the final test of a ceiling takes as many again, and 12
            at least.
        clock: as `bench` takes it.
        dtype: of the model; `auto` takes the checkpoint's.
        positions: as `patch` takes it.
        batch: questions at a time.
        clip: for methods that read the question.
    """

    model: str
    tasks: tuple[TaskConfig, ...]
    goal: Goal
    space: tuple[str, ...] = ()
    rules: Rules = field(default_factory=Rules)
    held_out: float = 0.5
    cost: str = TTFT
    rounds: int = 5
    clock: str = "wall"
    dtype: str = "float32"
    positions: str = "auto"
    batch: int = 16
    clip: str | None = None

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ConfigError: for values that are unknown, out of range or contradict each other.
        """
        if not self.tasks:
            raise ConfigError("A search needs questions; name a task, such as 'reference'.")
        if self.cost not in COSTS:
            raise ConfigError(f"cost is {self.cost!r}; allowed are {', '.join(COSTS)}.")
        if self.cost == FLOPS and self.goal.max_seconds is not None:
            raise ConfigError(
                "Operations are no seconds: with --cost flops give the ceiling as a share."
            )
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions is {self.positions!r}; use {', '.join(POSITIONS)}.")
        for name, least in (("batch", 1), ("rounds", _LEAST_ROUNDS)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; it must be {least} or more.")

    def answers(self) -> dict[str, Any]:
        """JSON-ready, what every answer depends on beside question and pipeline."""
        names = ("model", "dtype", "positions", "batch", "clip")
        return {**{name: getattr(self, name) for name in names}, "seed": self.rules.seed}

    def times(self) -> dict[str, Any]:
        """JSON-ready, what every cost depends on beside requests and pipeline."""
        names = ("model", "dtype", "positions", "clip", "cost", "rounds", "clock")
        return {name: getattr(self, name) for name in names}
