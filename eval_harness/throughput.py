"""Pictures answered per second, in batches and by requests that run at once.

A request begins with the picture and ends with its last token. Images per second are all pictures
over the whole duration, output tokens per second likewise; tokens of the prompt are never counted,
for compression changes their number. What is gained for one request alone need not be gained for
many, so both sweeps belong beside times at batch 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from statistics import median
from threading import Barrier
from typing import Any, TypeAlias

import torch

from eval_harness import machine
from eval_harness.clock import Clock
from eval_harness.requests import Request
from eval_harness.rounds import interleave, summary
from eval_harness.stages import parts
from eval_harness.subject import NONE, Keep, Subject, off, under
from vlmcompress.core.errors import ConfigError, VLMCompressError

Run: TypeAlias = tuple[float, list[float]]
"""Seconds of everything, and of each request."""

_BASE = "0"  # the unpatched model comes first


def sweep(
    model: Any,
    request: Request,
    configs: Sequence[tuple[str, Keep]],
    *,
    batches: Sequence[int] = (),
    concurrency: Sequence[int] = (),
    requests: int = 4,
    new_tokens: int = 16,
    repeats: int = 3,
    warmup: int = 1,
    clip: Any = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Images per second over batch sizes and over numbers of requests at once.

    The unpatched model is measured at every point, in turns with the configurations.

    Args:
        model: an unpatched VLM; unpatched again afterwards.
        request: that is made over and over.
        configs: (method, keep) pairs.
        batches: rows of one call.
        concurrency: threads that call one model at once, each with one request after the other.
        requests: that each thread makes in a round.
        new_tokens: length of every answer, 1 or more.
        repeats: timed rounds.
        warmup: rounds that are thrown away.
        clip: as `patch` takes it.
        progress: called with a line of text now and then.

    Returns:
        JSON-ready: `machine`, `protocol`, `request`, `batches` and `concurrency`: per size one row
        for the unpatched model (`none`) and for each configuration with `images_per_second`,
        `output_tokens_per_second`, `latency` (summary over requests; of a batch as a whole) and
        `speedup` in images per second. A row that ran out of memory has `error` instead.

    Raises:
        ConfigError: for sizes, rounds or lengths below 1.
    """
    sizes = [*batches, *concurrency, requests, new_tokens, repeats]
    if any(size < 1 for size in sizes) or warmup < 0:
        raise ConfigError(
            f"Batches, concurrency, requests, new tokens and repeats must be 1 or more and warm-up "
            f"0 or more; got {list(batches)}, {list(concurrency)}, {requests}, {new_tokens}, "
            f"{repeats} and {warmup}."
        )
    say = progress or (lambda line: None)
    subject = Subject(model, request, Clock(model.device), parts(model), clip)
    where, entries = machine.describe(model), [(NONE, None), *configs]
    found: dict[str, list[dict[str, Any]]] = {"batches": [], "concurrency": []}
    with subject.patched(configs) as handle:
        for kind, values in (("batches", batches), ("concurrency", concurrency)):
            for size in values:
                say(f"{kind} {size}")
                runs = {
                    str(number): _side(subject, handle, entry, kind, size, requests, new_tokens)
                    for number, entry in enumerate(entries)
                }
                per_round = size if kind == "batches" else size * requests
                found[kind] += _rows(runs, entries, size, per_round, new_tokens, repeats, warmup)
    return {
        "machine": where,
        "protocol": {
            "requests": requests,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "warmup": warmup,
        },
        "request": subject.describe(),
        **found,
    }


def _side(
    subject: Subject,
    handle: Any,
    entry: tuple[str, Keep],
    kind: str,
    size: int,
    requests: int,
    new_tokens: int,
) -> Callable[[], Run]:
    if kind == "batches":
        return partial(_batch, subject, handle, entry, size, new_tokens)
    return partial(_at_once, subject, handle, entry, size, requests, new_tokens)


def _answer(subject: Subject, rows: int, new_tokens: int) -> None:
    """A request from the picture to the last token."""
    assert isinstance(subject.given, Request)  # `sweep` takes no tensors
    inputs = subject.given.inputs(subject.model, rows)
    with torch.no_grad():
        subject.model.generate(
            **inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )


def _batch(
    subject: Subject, handle: Any, entry: tuple[str, Keep], rows: int, new_tokens: int
) -> Run:
    """One call of many rows."""
    with under(handle, *entry):
        seconds = subject.clock.time(lambda: _answer(subject, rows, new_tokens))
    return seconds, [seconds]


def _at_once(
    subject: Subject,
    handle: Any,
    entry: tuple[str, Keep],
    threads: int,
    requests: int,
    new_tokens: int,
) -> Run:
    """Threads that begin together; each makes its requests one after the other."""
    start, clock = Barrier(threads), Clock(subject.clock.device)

    def client() -> list[float]:
        # Whether a call runs uncompressed is a matter of its thread.
        with off(handle) if entry[0] == NONE else nullcontext():
            start.wait()
            return [clock.time(lambda: _answer(subject, 1, new_tokens)) for _ in range(requests)]

    def everything() -> None:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(client) for _ in range(threads)]:
                latencies.extend(done.result())

    latencies: list[float] = []
    with under(handle, *entry):
        return clock.time(everything), latencies


def _rows(
    sides: dict[str, Callable[[], Run]],
    entries: Sequence[tuple[str, Keep]],
    size: int,
    images: int,
    new_tokens: int,
    repeats: int,
    warmup: int,
) -> list[dict[str, Any]]:
    """One row per entry at one size; entries that do not fit into memory are left out of turns."""
    fitting: dict[str, Callable[[], Run]] = {}
    why = {}
    for name, side in sides.items():
        try:
            side()
        except (torch.OutOfMemoryError, VLMCompressError) as error:
            why[name] = str(error).splitlines()[0]
        else:
            fitting[name] = side
    runs = interleave(fitting, repeats, max(0, warmup - 1))  # the first run was a warm-up
    rows = []
    for name, (method, keep) in zip(sides, entries, strict=True):
        row: dict[str, Any] = {"method": method, "keep": keep, "size": size}
        if name in why:
            rows.append({**row, "error": why[name]})
            continue
        base = runs.get(_BASE, [])
        rate = images * repeats / sum(seconds for seconds, _ in runs[name])
        ratios = [b / mine for (mine, _), (b, _) in zip(runs[name], base, strict=False)]
        rows.append(
            {
                **row,
                "images_per_second": rate,
                "output_tokens_per_second": rate * new_tokens,
                "latency": summary([s for _, latencies in runs[name] for s in latencies]),
                "speedup": median(ratios) if ratios else None,
            }
        )
    return rows
