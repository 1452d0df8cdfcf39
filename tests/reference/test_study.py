"""The study of the reference model: its parts, its resumption, its targets, its tables."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from eval_harness import resume
from vlmcompress.core.errors import ConfigError
from vlmcompress.reference import KINDS, TEXT_KINDS, card, study
from vlmcompress.reference.curve import TRAINING_LOG
from vlmcompress.reference.detector import area_under_curve, detector_quality
from vlmcompress.reference.study import Plan, targets
from vlmcompress.reference.weights import load
from vlmcompress.reference.worlds import chance

PLAN = Plan({"objects": 16, "text": 6}, ("vtc_cls", "random", "oracle_asked"), (1.0, 0.1), 2, 4)


def _estimate(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}


def _results(kinds=KINDS, *, full=0.97, best=0.96, random=0.6, asked=0.97, worst=0.9):
    row = {
        "vtc_cls": _estimate(best),
        "random": _estimate(random),
        "oracle_asked": _estimate(asked),
    }
    by_kind = {**dict.fromkeys(kinds, full), kinds[2]: worst}
    return {
        "full": _estimate(full),
        "accuracy": {"1.0": dict.fromkeys(row, _estimate(full)), "0.1": row, "0.05": row},
        "by_kind": by_kind,
        "by_kind_at": {"0.1": dict.fromkeys(row, by_kind)},
        "blind_by_kind": {kind: chance(kind) + 0.01 for kind in kinds},
        "blind_interval": _estimate(0.3),
    }


def _detector():
    layers = [{"layer": name, "auc": 0.9, "mass": 0.5} for name in (-2, -1, "mean")]
    return {"scenes": 4, "area": 0.14, "layers": layers}


def _fake(name):
    world, _, mode = name.partition("-")
    if mode == "detector":
        return _detector()
    return _results(KINDS if world == "objects" else TEXT_KINDS)


@pytest.fixture
def measured(monkeypatch):
    """Names of parts that were really measured, without measuring them."""
    seen = []

    def computed(parts, processes):
        for part in parts:
            seen.append(part.name)
            yield part, _fake(part.name)

    monkeypatch.setattr(resume, "computed", computed)
    return seen


NAMES = ["-".join(part) for part in PLAN.parts()]


def test_area_under_curve_counts_pairs():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (5, 40)).astype(float)  # with ties
    positive = rng.random((5, 40)) < 0.3
    for row, hits, found in zip(scores, positive, area_under_curve(scores, positive), strict=True):
        differences = row[hits][:, None] - row[~hits][None]
        wins = (differences > 0).mean() + 0.5 * (differences == 0).mean()
        assert found == pytest.approx(wins)


def test_detector_reads_every_layer_and_the_last_find_objects():
    model, _ = load()
    found = detector_quality(model, scenes=40)
    assert [row["layer"] for row in found["layers"]] == [*range(-8, 0), "mean"]
    assert 0.08 < found["area"] < 0.25
    late = {row["layer"]: row for row in found["layers"]}
    assert late[-2]["mass"] >= 3 * found["area"]
    assert late[-2]["auc"] > 0.9 > 0.5
    assert all(0 <= row["mass"] <= 1 for row in found["layers"])


def test_a_stopped_study_measures_only_what_is_left(measured, tmp_path):
    first = study.study(PLAN, tmp_path)
    assert measured == NAMES
    again = study.study(PLAN, tmp_path)
    assert measured == NAMES
    assert again == first == json.loads(json.dumps(first))
    (tmp_path / "text-original.json").write_text("{")
    (tmp_path / "objects-detector.json").unlink()
    del measured[:]
    assert study.study(PLAN, tmp_path) == first
    assert measured == ["text-original", "objects-detector"]


def test_parts_of_another_plan_are_measured_again(measured, tmp_path):
    study.study(PLAN, tmp_path)
    del measured[:]
    study.study(replace(PLAN, seeds=3), tmp_path)
    assert measured == NAMES


def test_targets_say_what_was_found():
    found = targets({"objects": {"contiguous": _results()}})
    assert len(found) == 5
    assert all(t["met"] for t in found)
    assert "count 90.0 %" in found[1]["found"]


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"full": 0.94, "worst": 0.94}, {0}),
        ({"worst": 0.89}, {1}),
        ({"best": 0.9}, {3}),
        ({"random": 0.95}, {4}),
    ],
)
def test_missed_targets_are_said(change, missed):
    found = targets({"objects": {"contiguous": _results(**change)}})
    assert {i for i, t in enumerate(found) if not t["met"]} == missed


def test_blind_far_from_chance_is_said():
    results = _results()
    results["blind_by_kind"]["glyph"] = 0.2
    found = targets({"objects": {"contiguous": results}})
    assert not found[2]["met"]
    assert found[2]["found"] == "glyph 20.0 %, chance 10.0 %"


def test_no_targets_without_what_they_compare():
    results = _results()
    del results["accuracy"]["0.1"]["random"]
    assert targets({"objects": {"contiguous": results}}) == []
    assert targets({}) == []


def test_bad_plans_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="allowed are objects, text"):
        study.study(replace(PLAN, questions={"words": 3}), tmp_path)
    with pytest.raises(ConfigError, match="trained weights"):
        study.study(PLAN, tmp_path, weights=tmp_path)


def test_the_card_is_made_of_the_study(measured, tmp_path):
    log = json.loads(TRAINING_LOG.read_text())
    page = card.card(log, study.study(PLAN, tmp_path))
    assert "| `vtc_cls` | 96.0 (95.0-97.0) | 96.0 (95.0-97.0) |" in page
    assert "| all tokens: every kind at least 90 % | count 90.0 % | yes |" in page
    assert "16 about objects, 6 about text" in page
    assert page.startswith("---\nlicense:")
    detector = card.detector_table(study.study(PLAN, tmp_path))
    assert "| mean | 0.900 | 0.500 | 0.900 | 0.500 |" in detector


@pytest.mark.slow
def test_a_small_study_from_end_to_end(tmp_path):
    parts = []
    plan = replace(PLAN, questions={"text": 6}, seeds=2)
    found = study.study(plan, tmp_path, processes=1, progress=parts.append)
    assert len(parts) == 3
    results = found["worlds"]["text"]["contiguous"]
    assert results["n"] == 6
    assert results["positions"] == "contiguous"
    assert len(results["by_seed"]["0.1"]["random"]) == 2
    assert results["accuracy"]["0.1"]["random"]["mean"] == pytest.approx(
        np.mean(results["by_seed"]["0.1"]["random"])
    )
    assert found["targets"] == []
