"""Time by stage, without forcing the device to wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch


class Stopwatch:
    """Accumulates seconds per stage; CUDA stages are measured by events and read lazily."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        """A moment on the device's clock."""
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, stage: str, start: Any, stop: Any) -> None:
        """Count the span between two moments for `stage`."""
        self._spans.append((stage, start, stop))

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        """Count the time inside for `stage`."""
        start = self.mark()
        yield
        self.add(stage, start, self.mark())

    def seconds(self) -> Mapping[str, float]:
        """Seconds per stage; waits for the device when spans are events."""
        totals: dict[str, float] = {}
        for stage, start, stop in self._spans:
            if self._cuda:
                stop.synchronize()
                seconds = start.elapsed_time(stop) / 1000
            else:
                seconds = stop - start
            totals[stage] = totals.get(stage, 0.0) + seconds
        return totals
