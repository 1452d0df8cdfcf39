"""Methods inside the language model at equal averages: the plan, a small study, its table."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from eval_harness import layerwise
from eval_harness.layerwise_tables import rows, time_rows
from tests.project import ROOT
from vlmcompress import ConfigError
from vlmcompress.cli import app
from vlmcompress.methods import registry
from vlmcompress.methods.decoder.base import LayerReducer

ADAPTER = str(ROOT / "adapters" / "atp-reference")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A study of a few questions, and its plan and folder."""
    plan = layerwise.Plan(
        questions=9,
        methods=("random_layer", "pyramiddrop", "holitom_llm"),
        budgets=(0.5,),
        adapters=(ADAPTER,),
        seeds=2,
    )
    folder = tmp_path_factory.mktemp("parts")
    return plan, folder, layerwise.study(plan, folder, processes=0)


def test_every_schedule_that_takes_an_average_is_there():
    names = layerwise.schedules()
    for name in registry.BUILTIN:
        kind = registry.get(name)
        fits = issubclass(kind, LayerReducer) and kind.training_free
        assert (name in names) == fits, name
    assert layerwise.AGAINST in names


@pytest.mark.parametrize(
    "methods", [("pyramiddrop",), ("random_layer", "atp"), ("random_layer", "tome")]
)
def test_plans_that_cannot_be(methods):
    with pytest.raises(ConfigError, match="give random_layer and any of"):
        layerwise.Plan(methods=methods)


def test_rows_cost_what_was_asked(found):
    _, _, results = found
    by_name = {row["name"]: row for row in results["rows"]}
    fixed = by_name["pyramiddrop 0.5"]
    assert fixed["average"] == pytest.approx(0.5, abs=0.01)
    assert fixed["left"][0] == results["tokens"]
    assert sum(fixed["left"]) / len(fixed["left"]) / results["tokens"] == pytest.approx(
        fixed["average"]
    )
    assert 0 < fixed["flops"] < 1
    assert fixed["over_random"] is not None
    assert by_name["random_layer 0.5"]["over_random"] is None
    late = by_name["holitom_llm 0.5"]
    assert late["accuracy"] is None
    assert "average_keep is 0.5" in late["refused"]
    own = by_name["atp (atp-reference)"]
    assert own["wanted"] is None
    assert 0 < own["average"] < 1
    assert str(ROOT) not in json.dumps(results["plan"])


def test_the_table_puts_budgets_together_and_refusals_last(found):
    header, table = rows(found[2])
    assert all(len(row) == len(header) for row in table)
    assert [row[0] for row in table][-2:] == ["`holitom_llm`", "`atp`"]
    assert table[-2][2].startswith("cannot")


def test_what_was_measured_is_not_measured_again(found, monkeypatch):
    plan, folder, results = found
    monkeypatch.setattr(layerwise, "ask_row", None)
    monkeypatch.setattr(layerwise, "ask_bare", None)
    assert layerwise.study(plan, folder, processes=0) == results


def test_times_are_told_against_the_unpatched_model_and_the_ideal(tmp_path):
    file = tmp_path / "times.json"
    words = ["bench", "--random-weights", "tiny", "--methods", "fastv,holitom_llm"]
    words += ["--keeps", "0.25", "--repeats", "1", "--warmup", "0", "--new-tokens", "3"]
    done = CliRunner().invoke(app, [*words, "--out", str(file)])
    assert done.exit_code == 0, done.output
    results = json.loads(file.read_text())
    header, lines = time_rows(results)
    assert [line[0] for line in lines] == ["unpatched", "`fastv`", "`holitom_llm`"]
    assert all(len(line) == len(header) for line in lines)
    whole, fastv = float(lines[0][2]), float(lines[1][2])
    assert 0.25 * whole < fastv < whole  # dropped only behind some layers
    for line, row in zip(lines[1:], results["configs"], strict=True):
        assert float(line[-1]) == pytest.approx(row["ideal_ratio"], abs=5e-4)
        assert float(line[-2]) == pytest.approx(row["tpot"] / row["baseline"]["tpot"], abs=5e-3)
