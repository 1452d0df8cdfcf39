"""One clock for CPU and GPU: marks that do not stall the device, seconds read afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch

from vlmcompress.core.errors import ConfigError

ClockKind: TypeAlias = Literal["wall", "cpu"]
Mark: TypeAlias = Any  # seconds on CPU, a CUDA event on GPU


class Clock:
    """Takes time marks on a device."""

    def __init__(self, device: torch.device | str, kind: ClockKind = "wall") -> None:
        """Of the device where the timed work runs.

        Args:
            device: CPU or GPU.
            kind: `wall`, or `cpu` for the processor time of this process summed over its threads,
                which other processes on the machine hardly change. For one thread, on CPU.

        Raises:
            ConfigError: for processor time of work on a GPU, or another kind.
        """
        self.device = torch.device(device)
        self._cuda = self.device.type == "cuda"
        if kind not in get_args(ClockKind) or (kind == "cpu" and self._cuda):
            raise ConfigError(
                f"The clock is {kind!r} on {self.device.type}; allowed are 'wall' and, for models "
                "on CPU, 'cpu'."
            )
        self.kind = kind
        self._now = time.process_time if kind == "cpu" else time.perf_counter

    def synchronize(self) -> None:
        """Wait until the device has done all queued work."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def mark(self) -> Mark:
        """A point in time, in the order of the device's work."""
        if not self._cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Time between two marks; on a GPU only after `synchronize`."""
        return start.elapsed_time(end) / 1000 if self._cuda else end - start

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, from an idle device to an idle device."""
        self.synchronize()
        start = self._now()
        call()
        self.synchronize()
        return self._now() - start

    def peak_memory(self, call: Callable[[], Any]) -> int | None:
        """Bytes of device memory at the peak of a call, weights included; None on CPU."""
        if not self._cuda:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)
