"""What `bench` measures and reports; times themselves are not asserted."""

from __future__ import annotations

import json
import time

import pytest
import torch

from eval_harness import bench, rounds, shapes
from eval_harness.clock import Clock
from eval_harness.stages import parts, timed_call
from vlmcompress.core.costs import cache_bytes
from vlmcompress.core.errors import ConfigError, UnsupportedModelError

STAGES = ("tower", "evidence", "selection", "connector", "prefill", "other")


@pytest.fixture(scope="module")
def model():
    return shapes.build("tiny")


@pytest.fixture(scope="module")
def results(model):
    configs = [("vtc_cls", 0.1), ("uniform", 9)]
    return bench(model, shapes.example_inputs(model), configs, repeats=2, warmup=1, new_tokens=3)


def test_rounds_alternate():
    order = []
    sides = {name: lambda name=name: order.append(name) or {"t": 1.0} for name in "ab"}
    samples = rounds.interleave(sides, repeats=4, warmup=2)
    assert "".join(order) == "abba" * 3
    assert [len(rows) for rows in samples.values()] == [4, 4]


def test_summary():
    found = rounds.summary([float(i) for i in range(101)])
    expected = {"median": 50.0, "mean": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "min": 0.0}
    assert found == {**expected, "stdev": pytest.approx(29.3, abs=0.01)}
    alone = rounds.summary([2.0])
    assert alone.pop("stdev") == 0
    assert set(alone.values()) == {2.0}


def test_stages_add_up_and_hooks_are_gone(model):
    inputs = shapes.example_inputs(model)
    stages, trace, output = timed_call(
        lambda: model(**inputs, use_cache=True, logits_to_keep=1), parts(model), Clock("cpu"), True
    )
    pieces = [stages[name] for name in ("tower", "selection", "connector", "prefill")]
    assert sum(pieces) == pytest.approx(stages["ttft"])
    assert min(pieces) > 0
    assert trace.connector_tokens == 36
    assert trace.embeddings.shape == (1, 100, 64)
    assert output.logits.shape[1] == 1
    found = parts(model).named()
    assert set(found) == {"tower", "connector", "language_model", "head"}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in found.values())


def test_kv_bytes_of_a_real_cache(model):
    inputs = shapes.example_inputs(model)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    layers, heads, head_dim, float32 = 3, 2, 16, 4
    assert cache_bytes(cache) == 2 * layers * heads * head_dim * 100 * float32


def test_processor_time_stands_still_while_sleeping():
    wall, cpu = (Clock("cpu", kind).time(lambda: time.sleep(0.05)) for kind in ("wall", "cpu"))
    assert cpu < wall
    with pytest.raises(ConfigError, match="wall"):
        Clock("cpu", "sun")


def test_models_without_a_tower():
    with pytest.raises(UnsupportedModelError, match="no tower"):
        parts(torch.nn.Linear(1, 1))


def test_no_configurations(model):
    with pytest.raises(ConfigError, match="configurations"):
        bench(model, {}, [])


def test_results_are_json(results):
    assert json.loads(json.dumps(results)) == results
    assert results["floor_ratio"] == results["configs"][0]["floor_ratio"] > 0
    protocol = {"repeats": 2, "warmup": 1, "new_tokens": 3, "clock": "wall"}
    assert results["protocol"] == protocol


def test_machine_is_described(results):
    found = results["machine"]
    assert found["shape"] == "tiny"
    assert found["dtype"] == "float32"
    assert found["attention"] == {"tower": "sdpa", "language_model": "sdpa"}
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()


def test_each_configuration(results):
    for row, kept in zip(results["configs"], (4, 9), strict=True):
        base = row["baseline"]
        assert (base["tokens"], row["tokens"]) == (36, kept)
        assert (base["prompt_tokens"], row["prompt_tokens"]) == (100, 64 + kept)
        assert row["kv_bytes"] * 100 == base["kv_bytes"] * (64 + kept)
        assert row["flops"]["prefill"] < base["flops"]["prefill"]
        assert set(row["ttft"]) == {"median", "mean", "stdev", "p90", "p95", "p99", "min"}
        assert set(row["stages"]) == set(STAGES)
        assert row["ttft_from_image"] is None  # tensors were given
        assert row["ideal_ratio"] > 0
        assert row["tokens_in_layers"] == [kept] * 3
        assert row["speedup"] > 0
        assert row["tpot"] > 0
        assert row["peak_memory_bytes"] is None


def test_evidence_only_where_a_method_looks(results):
    looks, does_not = results["configs"]
    assert looks["evidence"]["tower_on"] > 0
    assert does_not["evidence"] is None


def test_model_is_left_unpatched(model, results):
    assert "forward" not in model.__dict__
    assert "generate" not in model.__dict__
