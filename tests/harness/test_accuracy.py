"""`evaluate` on an untrained model: the schema, the controls and the reuse of the tower."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch

from eval_harness import asking, evaluate
from eval_harness.asking import is_right
from eval_harness.controls import oracle
from tests.seam.equalities import RandomSource
from vlmcompress.core.errors import ConfigError, UnknownMethodError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods import registry
from vlmcompress.methods.connector.fastervlm import FasterVLM
from vlmcompress.methods.connector.uniform import Uniform
from vlmcompress.reference import samples

METHODS = ["vtc_cls", "fastervlm", "random", "uniform", "oracle", "anti_oracle"]


@pytest.fixture(scope="module")
def asked():
    return list(samples("test", 16))


def _evaluate(model, processor, asked, **options):
    options = {"methods": METHODS, "keeps": [1.0, 0.1], "batch_size": 10, "seed": 1, **options}
    return evaluate(model, processor, asked, **options)


@pytest.fixture(scope="module")
def results(model, processor, asked):
    return _evaluate(model, processor, asked)


def test_schema(results, asked):
    assert json.loads(json.dumps(results)) == results
    assert results["n"] == 16
    assert results["images"] == len({s.scene_id for s in asked})
    assert set(results["accuracy"]) == {"1.0", "0.1"}
    for rows in results["accuracy"].values():
        assert set(rows) == set(METHODS)
        assert all(0 <= r["low"] <= r["mean"] <= r["high"] <= 1 for r in rows.values())
    assert set(results["by_kind"]) == {s.kind for s in asked}
    assert 0 <= results["blind"] <= 1
    assert results["seed"] == 1
    assert isinstance(results["commit"], str)


def test_full_budget_is_the_full_model(results):
    for name in METHODS:
        assert results["accuracy"]["1.0"][name] == results["full"]
        assert results["difference"]["1.0"][name]["mean"] == 0
    assert results["full"]["mean"] == pytest.approx(np.mean(list(results["by_kind"].values())))


def test_reused_tower_changes_no_answer(monkeypatch, model, processor, asked):
    monkeypatch.setattr(asking, "is_right", lambda answer, _: zlib.crc32(answer.encode()) % 2 == 0)
    width = model.model.vision_tower.config.hidden_size
    names = [name for name in registry.names() if registry.get(name).stage != "decoder"]
    names.remove("early_exit_tower")  # takes no keep
    names.remove("bus")  # its weights are made for embeddings of CLIP's width
    names.append("oracle_asked")
    options = {"methods": names, "keeps": [0.1], "clip": RandomSource(width)}
    first = _evaluate(model, processor, asked, **options)
    again = _evaluate(model, processor, asked, **options, reuse_tower=False)
    assert again["by_kind_at"] == first["by_kind_at"]
    means = {name: row["mean"] for name, row in first["accuracy"]["0.1"].items()}
    assert len(set(means.values())) > 1


def test_tower_runs_once_per_image(model, processor, asked):
    images = []
    hook = model.model.vision_tower.embeddings.register_forward_hook(
        lambda module, args, output: images.append(len(output))
    )
    _evaluate(model, processor, asked, batch_size=16)
    hook.remove()
    assert images == [len({s.scene_id for s in asked})]


def test_one_selection_is_asked_in_both_position_modes(monkeypatch, model, processor, asked):
    monkeypatch.setattr(asking, "is_right", lambda answer, _: zlib.crc32(answer.encode()) % 2 == 0)
    names, modes = ["vtc_cls", "tome", "random"], ("contiguous", "original")
    plan = asking.Asking.of(names, [0.1], positions=modes, seeds=2, controls=False, tolerant=True)
    both = asking.ask(model, processor, asked, plan, batch_size=10, seed=1)
    for mode in modes:
        alone = asking.Asking.of(
            names, [0.1], positions=(mode,), seeds=2, controls=False, tolerant=True
        )
        found = asking.ask(model, processor, asked, alone, batch_size=10, seed=1, reuse_tower=False)
        for cell, rows in found.right.items():
            np.testing.assert_array_equal(rows, both.right[cell])
    assert {cell.method: len(rows) for cell, rows in both.right.items()} == {
        "vtc_cls": 1,
        "tome": 1,
        "random": 2,
    }


def test_what_the_library_refuses_is_noted_or_raised(model, processor, asked):
    class Unordered(Uniform):
        raster_order = False

    options = {"positions": ("contiguous", "original"), "controls": False}
    tolerant = asking.Asking.of([Unordered(), "pool"], [0.1], tolerant=True, **options)
    found = asking.ask(model, processor, asked, tolerant)
    (refused,) = found.refused
    assert refused == asking.Cell("original", "uniform", 0.1)
    assert "contiguous" in found.refused[refused]
    assert len(found.right) == 3
    with pytest.raises(ConfigError):
        asking.ask(model, processor, asked, asking.Asking.of([Unordered()], [0.1], **options))


def test_spec_strings_are_methods(model, processor, asked):
    spec = "fastervlm(layer=-3)"
    found = _evaluate(model, processor, asked, methods=[spec, FasterVLM(layer=-3)], keeps=[0.2])
    assert found["accuracy"]["0.2"][spec] == found["accuracy"]["0.2"]["fastervlm"]
    with pytest.raises(UnknownMethodError):
        _evaluate(model, processor, asked, methods=["no_such(layer=3)"])


def test_right_answers_count(monkeypatch, model, processor, asked):
    monkeypatch.setattr(asking, "is_right", lambda answer, expected: expected != "yes")
    found = _evaluate(model, processor, asked, methods=["uniform"], keeps=[0.5])
    right = {s.kind: [] for s in asked}
    for sample in asked:
        right[sample.kind].append(sample.answer != "yes")
    expected = np.mean([np.mean(rows) for rows in right.values()])
    assert found["accuracy"]["0.5"]["uniform"]["mean"] == pytest.approx(expected)


def test_model_is_left_unpatched(model, results):
    assert "forward" not in model.model.vision_tower.__dict__
    assert "generate" not in model.__dict__


def test_answers_compare_loosely():
    assert is_right(" Red \n", "red")
    assert not is_right("red square", "red")


def test_oracles_take_what_is_covered(asked):
    tokens = VisualTokens.from_features(torch.zeros(len(asked), 196, 1))
    best, worst = (oracle(n, asked).compress(tokens, 0.1) for n in ("oracle", "anti_oracle"))
    for i, sample in enumerate(asked):
        chosen = sample.object_coverage[best.index[i].numpy()]
        left_out = np.delete(sample.object_coverage, best.index[i].numpy())
        assert chosen.min() >= left_out.max() - 2e-3
        assert sample.object_coverage[worst.index[i].numpy()].max() < 2e-3


def test_unknown_and_repeated_methods(model, processor, asked):
    with pytest.raises(UnknownMethodError):
        _evaluate(model, processor, asked, methods=["no_such_method"])
    with pytest.raises(ConfigError, match="twice"):
        _evaluate(model, processor, asked, methods=["random", "random"])
    with pytest.raises(ConfigError, match="at least one sample"):
        _evaluate(model, processor, [])
