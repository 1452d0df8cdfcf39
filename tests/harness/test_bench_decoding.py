"""Times of a generation: definitions, on times written by hand and on a model."""

from __future__ import annotations

import pytest

from eval_harness import bench, requests, shapes
from eval_harness.clock import Clock
from eval_harness.decoding import Generation, generate_once, summarize
from eval_harness.rounds import stages
from eval_harness.stages import parts

FAST = Generation(ttft=1.0, e2e=3.0, gaps=(0.5, 1.0), processor=0.25)
SLOW = Generation(ttft=2.0, e2e=5.0, gaps=(1.0, 1.5), processor=0.75)
ALONE = Generation(ttft=1.0, e2e=1.5, gaps=())


def test_time_per_token_is_what_follows_the_first_over_the_tokens_after_it():
    assert FAST.tpot == (3.0 - 1.0) / 2
    assert ALONE.tpot is None  # undefined, not 0


def test_what_is_told_of_several_generations():
    found = summarize([FAST, SLOW], 3)
    assert found["ttft"]["mean"] == 1.5
    assert found["ttft_from_image"]["mean"] == 2.0  # 1.25 and 2.75
    assert found["e2e_from_image"]["mean"] == 4.5
    assert found["tpot"]["mean"] == pytest.approx((1.0 + 1.5) / 2)
    assert found["itl"]["mean"] == pytest.approx((0.5 + 1.0 + 1.0 + 1.5) / 4)  # pooled gaps
    assert found["output_tokens_per_second"] == pytest.approx(6 / 8)


def test_a_single_token_has_no_gaps_and_tensors_have_no_picture():
    found = summarize([ALONE], 1)
    assert found["tpot"] is found["itl"] is found["ttft_from_image"] is None


def test_times_of_a_generation_are_in_order():
    model = shapes.build("tiny")
    inputs = shapes.example_inputs(model)
    run = generate_once(model, inputs, parts(model), Clock("cpu"), 4)
    assert len(run.gaps) == 3
    assert min(run.gaps) > 0
    assert 0 < run.ttft < run.ttft + sum(run.gaps) <= run.e2e


def test_stages_are_told_apart_by_the_librarys_clock():
    row = {"ttft": 10.0, "tower": 4.0, "selection": 3.0, "connector": 1.0, "prefill": 2.0}
    seen = {**row, "processor": 5.0, "reported_evidence": 0.5, "reported_selection": 1.0}
    split = stages(seen)
    expected = {"processor": 5.0, "tower": 3.5, "evidence": 0.5, "selection": 1.0, "other": 2.0}
    assert {name: split[name] for name in expected} == expected
    assert sum(split.values()) == row["ttft"] + 5.0
    whole = stages(seen, reported=False)  # another clock took the times
    assert (whole["tower"], whole["evidence"], whole["other"]) == (4.0, 0.0, 3.0)


def test_a_request_is_timed_from_its_picture():
    model = shapes.build("tiny-next")
    (row,) = bench(
        model, requests.of_shape(model), [("vtc_cls", 0.25)], repeats=2, warmup=0, new_tokens=2
    )["configs"]
    assert row["stages"]["processor"] > 0
    assert row["ttft_from_image"]["min"] > row["ttft"]["min"]
    assert row["decode"]["e2e_from_image"]["min"] > row["decode"]["e2e"]["min"]
    assert row["baseline"]["stages"]["evidence"] == 0
    assert row["stages"]["evidence"] > 0


def test_unpatched_beside_itself():
    model = shapes.build("tiny-qwen2.5-vl")  # a family that cannot be compressed
    results = bench(
        model, requests.of_shape(model), [("none", None)], repeats=1, warmup=0, new_tokens=0
    )
    (row,) = results["configs"]
    assert results["request"] == {"image_size": [128, 128], "batch": 1, "prompt_tokens": 128}
    assert row["tokens"] == row["baseline"]["tokens"] == 64
    assert row["flops"] == row["baseline"]["flops"]
    assert row["decode"] is None
    assert row["reported"] == {}
    assert row["ideal_ratio"] > 0
