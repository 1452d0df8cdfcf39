"""Two models in two threads, one model in two threads, and 500 generates with flat memory."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import psutil
import torch

from tests import tiny
from tests.seam import oracle
from tests.tiny import Prompt
from vlmcompress import patch


def run_many(model, calls, barrier, times=6):
    """Outputs and kept tokens of repeated generates in this thread."""
    from vlmcompress import handle_of

    barrier.wait()
    results = []
    for i in range(times):
        call = calls[i % len(calls)]
        with torch.no_grad():
            out = model.generate(**call, **oracle.greedy(model, 3))
        results.append((i % len(calls), out, handle_of(model).last.kept))
    return results


def check(results, wanted):
    for index, out, kept in results:
        assert torch.equal(out, wanted[index][0])
        assert all(torch.equal(a, b) for a, b in zip(kept, wanted[index][1], strict=True))


def expected(model, handle, calls):
    with torch.no_grad():
        return [(model.generate(**c, **oracle.greedy(model, 3)), handle.kept) for c in calls]


def prompts(model, seeds):
    return [tiny.inputs(model, [Prompt(images=1 + s % 2, text=5 + s)], seed=s) for s in seeds]


def test_one_model_in_two_threads():
    model = tiny.build("llava")
    left, right = prompts(model, (1, 2)), prompts(model, (3, 4))
    with patch(model, keep=0.25) as handle:
        wanted = [expected(model, handle, calls) for calls in (left, right)]
        barrier = Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(run_many, model, calls, barrier) for calls in (left, right)]
            for job, want in zip(jobs, wanted, strict=True):
                check(job.result(), want)


def test_two_models_in_two_threads():
    models = [tiny.build("llava"), tiny.build("qwen2_vl")]
    calls = [prompts(model, (1, 2)) for model in models]
    handles = [patch(models[0], keep=0.25), patch(models[1], keep=5)]
    wanted = [expected(m, h, c) for m, h, c in zip(models, handles, calls, strict=True)]
    barrier = Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run_many, m, c, barrier) for m, c in zip(models, calls, strict=True)]
        for job, want in zip(jobs, wanted, strict=True):
            check(job.result(), want)


def test_disabled_holds_for_its_own_thread_only():
    model = tiny.build("llava")
    (call,) = prompts(model, (1,))
    with patch(model, keep=0.25) as handle:
        want = expected(model, handle, [call])
        with handle.disabled(), ThreadPoolExecutor(1) as pool:
            check(pool.submit(run_many, model, [call], Barrier(1), 1).result(), want)


def test_five_hundred_generates_leave_memory_flat():
    model = tiny.build("llava")
    (call,) = prompts(model, (1,))
    process = psutil.Process()

    def some(count):
        with torch.no_grad():
            for _ in range(count):
                model.generate(**call, **oracle.greedy(model, 1))
        gc.collect()
        return process.memory_info().rss, sum(
            issubclass(type(o), torch.Tensor) for o in gc.get_objects()
        )

    with patch(model, keep=0.25):
        some(50)
        memory, tensors = some(50)
        later_memory, later_tensors = some(400)
    assert later_tensors <= tensors + 8
    assert later_memory - memory < 16 * 2**20
