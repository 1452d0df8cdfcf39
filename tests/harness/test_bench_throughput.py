"""Images per second: what is counted, and that threads do not see each other's compression."""

from __future__ import annotations

import json
from threading import Lock

import pytest
import torch

from eval_harness import requests, shapes, throughput
from eval_harness.throughput import sweep
from vlmcompress.core.errors import ConfigError


@pytest.fixture(scope="module")
def model():
    return shapes.build("tiny")


@pytest.fixture(scope="module")
def results(model):
    return sweep(
        model,
        requests.of_shape(model),
        [("uniform", 0.25)],
        batches=[1, 3],
        concurrency=[2],
        requests=2,
        new_tokens=2,
        repeats=2,
        warmup=1,
    )


def test_every_size_has_the_unpatched_model_first(results):
    rows = [(row["size"], row["method"]) for row in results["batches"]]
    assert rows == [(1, "none"), (1, "uniform"), (3, "none"), (3, "uniform")]
    assert [row["method"] for row in results["concurrency"]] == ["none", "uniform"]
    assert json.loads(json.dumps(results)) == results


def test_tokens_are_images_times_the_answers_length(results):
    for row in results["batches"] + results["concurrency"]:
        assert row["output_tokens_per_second"] == pytest.approx(2 * row["images_per_second"])
        base = row["method"] == "none"
        assert (row["speedup"] == 1.0) if base else (row["speedup"] > 0)


def test_a_rate_is_all_pictures_over_all_seconds():
    sides = {"0": lambda: (4.0, [4.0]), "1": lambda: (2.0, [0.5, 2.0])}
    entries = [("none", None), ("uniform", 0.5)]
    base, row = throughput._rows(sides, entries, 8, 8, 5, 2, 0)
    assert (base["images_per_second"], row["images_per_second"]) == (2.0, 4.0)
    assert row["output_tokens_per_second"] == 20.0
    assert row["speedup"] == 2.0
    assert row["latency"]["median"] == 1.25


def test_what_does_not_fit_into_memory_is_told_and_the_rest_goes_on():
    def full():
        raise torch.OutOfMemoryError("no room\nat all")

    entries = [("none", None), ("uniform", 0.5)]
    base, row = throughput._rows({"0": full, "1": lambda: (1.0, [1.0])}, entries, 4, 4, 1, 1, 0)
    assert base["error"] == "no room"
    assert row["images_per_second"] == 4.0
    assert row["speedup"] is None


@pytest.mark.parametrize(("entry", "length"), [(("none", None), 100), (("uniform", 9), 73)])
def test_threads_run_as_they_are_told(model, entry, length):
    subject = throughput.Subject(
        model, requests.of_shape(model), throughput.Clock("cpu"), throughput.parts(model)
    )
    seen, lock = [], Lock()

    def note(module, args, kwargs):
        with lock:
            seen.append(kwargs["inputs_embeds"].shape[1])

    with subject.patched([("uniform", 9)]) as handle:
        hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
        seconds, latencies = throughput._at_once(subject, handle, entry, 3, 2, 1)
        hook.remove()
    assert seen == [length] * 6
    assert len(latencies) == 6
    assert max(latencies) <= seconds


@pytest.mark.parametrize("wrong", [{"batches": [0]}, {"concurrency": [-1]}, {"new_tokens": 0}])
def test_sizes_below_one(model, wrong):
    with pytest.raises(ConfigError, match="1 or more"):
        sweep(model, requests.of_shape(model), [("uniform", 0.5)], **wrong)
