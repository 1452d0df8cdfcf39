"""Fixed schedules at the FLOPs of another method, their layers chosen on held-out questions."""

from __future__ import annotations

import numpy as np
import pytest

from eval_harness.layerwise_tables import adaptive_rows
from eval_harness.schedules import Spent, against_schedules, joined, matched, scheduled
from eval_harness.tuning import candidates, tuned
from tests.project import ROOT
from vlmcompress import ConfigError
from vlmcompress.hub.folder import read
from vlmcompress.loading import load
from vlmcompress.methods import create
from vlmcompress.reference.data import samples

DEPTH, TOKENS = 8, 196


@pytest.fixture(scope="module")
def subject():
    return load("reference", device="cpu")


@pytest.fixture(scope="module")
def config(subject):
    return subject[0].config.get_text_config()


@pytest.fixture
def like():
    """All tokens in three layers, then one half, in questions of two lengths."""
    left = [TOKENS] * 3 + [TOKENS // 2] * (DEPTH - 3)
    return Spent(np.array([left, left]), np.array([20, 30]))


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "uniform_layer"])
@pytest.mark.parametrize("layers", [(1,), (2, 5)])
def test_matched_schedules_cost_the_same(like, config, name, layers):
    found = matched(create(name, layers=layers), like, config)
    ratio = scheduled(found, like, DEPTH).flops(config) / like.flops(config)
    assert 0.99 < ratio <= 1


def test_a_first_site_can_be_too_late(like, config):
    assert matched(create("fastv", layers=(7,)), like, config) is None


def test_candidates_differ_and_repeat_with_the_seed(like, config):
    found = candidates("pyramiddrop", 3, like, config, trials=5)
    layers = [m.options()["layers"] for m in found]
    assert len({tuple(row) for row in layers}) == 5
    again = candidates("pyramiddrop", 3, like, config, trials=5)
    assert [m.options()["layers"] for m in again] == layers
    other = candidates("pyramiddrop", 3, like, config, trials=5, seed=1)
    assert [m.options()["layers"] for m in other] != layers
    assert len(candidates("fastv", 1, like, config, trials=50)) < DEPTH - 1


def test_nothing_can_be_cheap_enough(config):
    least = Spent(np.array([[TOKENS] + [0] * (DEPTH - 1)]), np.array([20]))
    with pytest.raises(ConfigError, match="fewer, earlier layers"):
        candidates("pyramiddrop", 3, least, config, trials=2)


def test_what_several_runs_spend_is_one_after_the_other(like, config):
    both = joined([like, like])
    assert both.tokens.shape == (4, DEPTH)
    assert both.flops(config) == pytest.approx(like.flops(config))


def test_runs_are_compared_with_the_best_layers(subject):
    model, processor = subject
    (stage,) = read(ROOT / "adapters" / "atp-reference").located.stages
    method = create(stage.method, **stage.options)
    asked = list(samples("validation", 8))
    from eval_harness.schedules import spent

    spent_there = spent(model, processor, method, asked, 8)
    chosen = tuned(model, processor, asked, spent_there, sites=3, trials=2, batch_size=8)
    for row in chosen.values():
        best = " ".join(map(str, row["layers"]))
        assert row["tried"][best] == max(row["tried"].values())
    layers = {name: row["layers"] for name, row in chosen.items()}
    found = against_schedules(
        model, processor, [method, method], samples("test", 8), layers=layers, batch_size=8
    )
    assert len(found["runs"]) == 2
    assert found["runs"][0] == found["runs"][1]
    assert found["layers"] == layers
    for name, flops in found["flops"].items():
        assert flops == pytest.approx(found["flops"]["atp"], rel=0.02), name
    header, rows = adaptive_rows(found)
    assert [len(row) for row in rows] == [len(header)] * len(rows)
    assert rows[0][1] == "its own"
