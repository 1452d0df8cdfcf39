"""The processes that `accelerate launch` or `torchrun` started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from vlmcompress.core.errors import ResultsError
from vlmcompress.core.extras import require

T = TypeVar("T")

#: One process may have finished long before the last.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """Who shares the work.

    Attributes:
        rank: of this process.
        count: of processes.
        state: accelerate's; None in a process alone.
    """

    rank: int = 0
    count: int = 1
    state: Any = None

    @classmethod
    def here(cls, *, cpu: bool) -> Processes:
        """As the launcher says.

        Args:
            cpu: whether the model is on the CPU; the processes then talk through gloo.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        state = require("accelerate").PartialState(cpu=cpu, timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes, state)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process: with several, each has a GPU of its own."""
        return name if self.state is None or name == "cpu" else str(self.state.device)

    def gather(self, value: T) -> list[T]:
        """What every process gives, by rank; waits for all of them."""
        if self.state is None:
            return [value]
        found: list[T] = require("accelerate.utils").gather_object([value])
        return found

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something in the first process; all get its result, or its error.

        Raises:
            ResultsError: in the others, when it fails in the first.
        """
        if self.state is None:
            return work()
        error: Exception | None = None
        found: list[Any] = []
        if self.first:
            try:
                found.append(work())
            except Exception as raised:
                error = raised
        told = self.gather((found, None if error is None else str(error)))[0]
        if error is not None:
            raise error
        if told[1] is not None:
            raise ResultsError(f"The first process stopped: {told[1]}")
        result: T = told[0][0]
        return result
