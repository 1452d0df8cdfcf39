"""One clock for CPU and GPU: marks that do not stall the device, seconds read afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Mark: TypeAlias = Any  # seconds on CPU, a CUDA event on GPU


class Clock:
    """Takes time marks on a device."""

    def __init__(self, device: torch.device | str) -> None:
        """Of the device where the timed work runs."""
        self.device = torch.device(device)
        self._cuda = self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done all queued work."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def mark(self) -> Mark:
        """A point in time, in the order of the device's work."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Time between two marks; on a GPU only after `synchronize`."""
        return start.elapsed_time(end) / 1000 if self._cuda else end - start

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, from an idle device to an idle device."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def peak_memory(self, call: Callable[[], Any]) -> int | None:
        """Bytes of device memory at the peak of a call, weights included; None on CPU."""
        if not self._cuda:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)
