"""Published values: every one has a source, and ours are set beside them."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from eval_harness.lmms.runs import Outcome
from eval_harness.published import run, values
from vlmcompress.cli import app
from vlmcompress.core.errors import ConfigError, ResultsError
from vlmcompress.methods import pipeline, registry

NAME = "llava-1.5-7b"
KNOWN = values.published(NAME)
DATA = yaml.safe_load((values.FOLDER / f"{NAME}.yaml").read_text(encoding="utf-8"))


def test_every_value_has_a_source_that_says_where_it_is_from():
    assert len(KNOWN.rows) > 60
    for row in KNOWN.rows:
        assert row.sources
        assert row.values
        assert all(isinstance(value, int | float) for value in row.values.values())
    for told in KNOWN.sources.values():
        assert set(told) == {"what", "where", "read"}
        assert all(told.values())
    assert {key for row in KNOWN.rows for key in row.sources} == set(KNOWN.sources)


def test_no_source_says_two_things_of_one_setting():
    said = [
        (row.method, row.tokens, source, benchmark)
        for row in KNOWN.rows
        for source in row.sources
        for benchmark in row.values
    ]
    assert len(said) == len(set(said))


def test_shares_are_shares_and_budgets_are_below_the_full_model():
    for row in KNOWN.rows:
        assert 0 <= row.tokens <= KNOWN.tokens
        assert (row.tokens == KNOWN.tokens) == (row.method == "full")
        for key, value in row.values.items():
            assert 0 < value <= (2800 if key.startswith("mme") else 100)


@pytest.mark.parametrize("name", KNOWN.methods)
def test_methods_are_ours_or_say_why_not(name):
    method = KNOWN.methods[name]
    if not method.ours:
        assert method.note or name == "full"
        return
    for row in KNOWN.rows:
        if row.method == name:
            pipeline.build(method.ours, row.tokens)
    assert bool(method.clip) == registry.create(method.ours).needs().text


def test_benchmarks_say_how_they_are_run():
    for benchmark in KNOWN.benchmarks.values():
        run_by = (benchmark.task, benchmark.metric, benchmark.dataset)
        assert all(run_by) or (not any(run_by) and benchmark.note)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sources": []}, "has no source"),
        ({"sources": ["X"]}, "names the source 'X'"),
        ({"values": {"gqq": 1}}, "names the benchmark 'gqq'"),
        ({"method": "ToMee"}, "names the method 'ToMee'"),
    ],
)
def test_files_that_say_too_little_are_refused(change, told):
    data = copy.deepcopy(DATA)
    data["rows"][1] |= change
    with pytest.raises(ConfigError, match=told):
        values.parse(NAME, data)


def _wanted(**options):
    rows = KNOWN.chosen(["VTC-CLS", "FastV"], [64])
    given = {"benchmarks": ["gqa", "mme_total", "average"], **options}
    return run.Comparison(KNOWN, rows, **given)


@pytest.fixture
def at_hand(monkeypatch):
    """Everything that a measurement needs."""
    monkeypatch.setattr(run, "missing", lambda wanted: [])


def _fake(scores):
    """lmms-eval that finds the same scores for every setting, and what it was asked to run."""
    asked = []

    def runner(one):
        asked.append(one)
        found = {task: scores for task in one.tasks}
        return Outcome({"results": found}, {task: [] for task in one.tasks})

    return asked, runner


def test_ours_stand_behind_the_published_rows_of_their_setting(at_hand):
    scores = {"exact_match,none": 0.5, "mme_perception_score,none": 1000.0}
    asked, runner = _fake({**scores, "mme_cognition_score,none": 300.0})
    said: list[str] = []
    results = run.measure(_wanted(checkpoint="folder", limit=5), runner, said.append)
    rows = [(row["method"], row["tokens"], [*row["sources"]]) for row in results["rows"]]
    assert rows == [
        ("full", 576, ["S"]),
        ("full", 576, ["ours"]),
        ("VTC-CLS", 64, ["T"]),
        ("VTC-CLS", 64, ["ours"]),
        ("FastV", 64, ["S"]),
    ]
    assert results["rows"][3]["values"] == {"gqa": 50.0, "mme_total": 1300.0}
    assert results["limit"] == 5
    assert said == [str(one) for one in asked]
    assert [one.model_args for one in asked] == [
        {"pretrained": "folder"},
        {"pretrained": "folder", "method": "vtc_cls", "keep": 64, "clip": None},
    ]
    assert [list(one.tasks) for one in asked] == [["gqa", "mme"]] * 2
    assert len({one.out for one in asked}) == 2


def test_a_metric_that_is_not_there_is_told(at_hand):
    with pytest.raises(ResultsError, match="no 'mme_perception_score' for 'mme'"):
        run.measure(_wanted(), _fake({"exact_match,none": 0.5})[1])


def test_what_is_not_at_hand_is_named_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "installed", lambda: False)
    monkeypatch.setattr(run.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(run, "try_to_load_from_cache", lambda *_: None)
    asked, runner = _fake({})
    with pytest.raises(ConfigError) as raised:
        run.measure(_wanted(), runner)
    told = str(raised.value)
    for part in ("vlmcompress[lmms]", KNOWN.model, "lmms-lab-encoder/GQA", "lmms-lab-encoder/MME"):
        assert part in told
    assert "POPE" not in told
    assert not asked
    only_lmms_eval = run.missing(_wanted(online=True))
    assert len(only_lmms_eval) == 1
    assert "lmms-eval" in only_lmms_eval[0]


def test_what_is_at_hand_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "installed", lambda: True)
    monkeypatch.setattr(run.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("GQA", "MME"):
        (tmp_path / f"datasets--lmms-lab-encoder--{name}" / "snapshots" / "abc").mkdir(parents=True)
    model = tmp_path / "model"
    model.mkdir()
    assert len(run.missing(_wanted(checkpoint=str(model)))) == 1  # a folder without a model
    (model / "config.json").write_text("{}")
    assert run.missing(_wanted(checkpoint=str(model))) == []
    monkeypatch.setattr(run, "try_to_load_from_cache", lambda *_: "config.json")
    assert run.missing(_wanted()) == []


def _cli(*arguments, code=0):
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_values_are_printed():
    chosen = ("--list", "--methods", "vtc_cls; DivPrune", "--tokens", "64", "--benchmarks", "gqa")
    text = _cli("--published", NAME, *chosen).output
    assert text == _cli("published", NAME, *chosen).output
    lines = [line.split() for line in text.splitlines() if line]
    assert ["VTC-CLS", "64", "T", "55.7"] in lines
    assert ["DivPrune", "64", "C", "57.5"] in lines
    assert any(line[0] == "C:" for line in lines)
    assert not any(line[0] in ("H:", "HoloV") for line in lines)
    rows = json.loads(_cli("published", NAME, *chosen, "--json").output)["rows"]
    assert [row["method"] for row in rows] == ["full", "VTC-CLS", "DivPrune"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["llava-1.5"], "Did you mean 'llava-1.5-7b'"),
        ([NAME, "--list", "--methods", "VTC-CLSS"], "Did you mean 'VTC-CLS'"),
        ([NAME, "--list", "--tokens", "63"], "No value for 63 tokens"),
        ([NAME, "--list", "--tokens", "many"], "tokens is 'many'"),
        ([NAME, "--list", "--benchmarks", "gqb"], "Did you mean 'gqa'"),
    ],
)
def test_bad_input(arguments, told):
    assert told in _cli("published", *arguments, code=1).output


def test_what_is_missing_is_an_error_of_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "installed", lambda: False)
    told = _cli("--published", NAME, "--checkpoint", str(tmp_path), code=1).output
    assert "cannot be measured here" in told
    assert "--list" in told


def test_a_trial_is_called_one(at_hand, monkeypatch):
    scores = {"exact_match,none": 0.5}
    monkeypatch.setattr(run.measure, "__defaults__", (_fake(scores)[1], lambda line: None))
    told = _cli("published", NAME, "--benchmarks", "gqa", "--tokens", "29", "--limit", "3").output
    assert "first 3 questions only" in told
    assert "ours" in told


def test_results_can_be_kept(tmp_path):
    file = tmp_path / "values.json"
    _cli("published", NAME, "--list", "--out", str(file))
    assert SimpleNamespace(**json.loads(file.read_text())).name == NAME
