"""What the benchmark of selection measures and reports; times themselves are not asserted."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from eval_harness import selection, shapes
from eval_harness.selection import TowerOutput, measure
from scripts import readme
from vlmcompress.cli import app
from vlmcompress.core.errors import ConfigError
from vlmcompress.methods import TokenCompressor, registry


@pytest.fixture(scope="module")
def output():
    tower = shapes.build_tower("tiny", torch.bfloat16)
    return TowerOutput.of(tower, views=3)


def test_the_tower_is_that_of_the_shape():
    tower, whole = shapes.build_tower("tiny"), shapes.config("tiny").vision_config
    assert tower.config.hidden_size == whole.hidden_size
    states = tower(torch.zeros(1, 3, 48, 48)).last_hidden_state
    assert states.shape == (1, 37, 64)
    assert states.isfinite().all()


def test_the_output_has_the_towers_shape(output):
    assert (output.n, output.width, output.heads, output.depth) == (108, 64, 4, 6)
    tokens = output.tokens(registry.create("visionzip").needs())
    assert tokens.features.shape == (1, 108, 64)
    assert tokens.features.dtype == torch.bfloat16
    assert [segment.kind for segment in tokens.segments] == ["base", "tile", "tile"]
    (row,), (keys,) = tokens.evidence.cls_attention.values(), tokens.evidence.keys.values()
    assert row.shape == (1, 4, 108)
    torch.testing.assert_close(row.sum(-1), torch.ones(1, 4))
    assert keys.shape == (1, 108, 4, 16)


@pytest.mark.parametrize("name", selection.methods())
def test_every_method_finds_the_evidence_it_asks_for(output, name):
    method = registry.create(name)
    assert isinstance(method, TokenCompressor)
    tokens = output.tokens(method.needs())
    assert method.compress(tokens, 0.25).n == method.budget(tokens, 0.25) < 108


def test_all_connector_methods_are_measured():
    wanted = {
        name
        for name in registry.BUILTIN
        if registry.get(name).stage == "connector" and registry.get(name).training_free
    }
    assert wanted <= set(selection.methods())


def test_a_share_is_that_of_the_same_round(monkeypatch):
    """A round in which the machine is ten times as slow changes no share."""
    calls = []

    def time(self, call):
        calls.append(call())
        slow = 10 if len(calls) > 4 else 1  # two rounds of a tower and a method, then a slow one
        return slow * (0.01 if hasattr(calls[-1], "features") else 1.0)

    monkeypatch.setattr(selection.Clock, "time", time)
    found = measure(["uniform"], [0.5], shape="tiny", views=1, repeats=3, warmup=0)
    (row,) = found["methods"]
    assert row["share"] == pytest.approx(0.01)
    assert row["within"]
    assert found["tower"]["median"] == 1.0


@pytest.mark.parametrize(
    ("names", "keeps", "options", "message"),
    [
        ([], [0.1], {}, "0 methods"),
        (["uniform"], [], {}, "0 budgets"),
        (["uniform"], [0.1], {"repeats": 0}, "repeats=0"),
        (["uniform"], ["auto"], {}, "'auto'"),
        (["evit"], [0.1], {}, "stage 'tower'"),
    ],
)
def test_what_cannot_be_measured_is_refused(names, keeps, options, message):
    with pytest.raises(ConfigError, match=message):
        measure(names, keeps, shape="tiny", **options)


def test_the_command_and_its_table(tmp_path):
    file = tmp_path / "selection.json"
    words = "bench-selection --random-weights tiny --methods uniform,divprune --keeps 0.1,9"
    words += f" --repeats 1 --warmup 0 --device cpu --dtype float32 --out {file}"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert "divprune" in result.stdout
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = [(row["method"], row["keep"]) for row in found["methods"]]
    assert rows == [(name, keep) for name in ("uniform", "divprune") for keep in (0.1, 9)]
    assert found["protocol"]["tokens"] == 180
    found["methods"][0] |= {"share": 0.0123, "within": True}
    found["methods"][2] |= {"share": 0.5, "within": False}
    region = readme.selection_region(found)
    assert "| `uniform` | 1.23 % |" in region
    assert "| `divprune` | **50.00 %** |" in region
    assert "of `tiny` in float32 on 5 views (180 tokens of width 64)" in region
