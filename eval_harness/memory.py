"""Peak memory of one prefill, each configuration in a process of its own.

In one process a configuration inherits what an earlier one left: an allocator's pools, compiled
kernels, a heap that never shrinks. Bytes of the weights are told apart.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeAlias

import torch

from eval_harness.clock import Clock
from eval_harness.requests import Request
from eval_harness.stages import parts
from eval_harness.subject import Keep, Subject, under
from vlmcompress.core.errors import VLMCompressError

Make: TypeAlias = Callable[[], tuple[Any, Request, Any]]
"""Makes model, request and what `patch` takes as `clip`; processes import it, so it is a function
of a module, or a `functools.partial` of one."""

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_KIB = 1024


def peaks(make: Make, configs: Sequence[tuple[str, Keep]], batch: int = 1) -> list[dict[str, Any]]:
    """Peak memory of each configuration, measured in a fresh process.

    Args:
        make: makes what is measured.
        configs: (method, keep) pairs; the method `none` is the unpatched model.
        batch: rows of the prefill.

    Returns:
        Per pair what `peak` returns with `method` and `keep`; `error` instead where the process
        ran out of memory or was killed.
    """
    return [{"method": m, "keep": keep, **_apart(make, m, keep, batch)} for m, keep in configs]


def _apart(make: Make, method: str, keep: Keep, batch: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(peak, make, method, keep, batch).result()
        except BrokenProcessPool:
            return {"error": "the process was killed, most likely for want of memory"}
        except (torch.OutOfMemoryError, MemoryError, VLMCompressError) as error:
            return {"error": str(error).splitlines()[0] if str(error) else type(error).__name__}


def peak(make: Make, method: str, keep: Keep, batch: int = 1) -> dict[str, Any]:
    """Memory of the second prefill of a configuration, in this process.

    Returns:
        Bytes. `weights`: parameters and buffers. On a GPU `before` (allocated), `allocated` and
        `reserved`, the peaks of torch's allocator. On CPU `before` and `resident`: what the process
        holds in memory, and its peak, with the interpreter and libraries in it; None where the
        system does not tell.
    """
    model, request, clip = make()
    subject = Subject(model, request, Clock(model.device), parts(model), clip)
    inputs = request.inputs(model, batch)
    with subject.patched([(method, keep)]) as handle, under(handle, method, keep), torch.no_grad():
        subject.prefill(inputs)  # allocations that come but once
        found = _watched(model.device, lambda: subject.prefill(inputs))
    tensors = {t.data_ptr(): t.nbytes for t in _tensors(model)}
    return {"weights": sum(tensors.values()), **found}


def _tensors(model: Any) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _watched(device: torch.device, call: Callable[[], Any]) -> dict[str, int | None]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return {
            "before": before,
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    told = _reset_resident_peak()
    before_on_cpu = _resident("VmRSS") if told else None
    call()
    return {"before": before_on_cpu, "resident": _resident("VmHWM") if told else None}


def _reset_resident_peak() -> bool:
    """Whether the system forgets the peak so far (Linux does when asked)."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    """A field of the process's status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * _KIB
    return None
