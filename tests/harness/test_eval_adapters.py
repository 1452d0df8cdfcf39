"""Adapters at equal counts: which count each may answer at, paired differences, tables, a run."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from typer.testing import CliRunner

from eval_harness import adapter_tables, adapters, resume
from eval_harness.shelf import shelved
from scripts import readme
from tests.hub.adapters import PEFT_WARNING, with_lora
from vlmcompress import ConfigError, hub, patch
from vlmcompress.cli import app
from vlmcompress.reference import load

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)
OF = 196
RIGHT = {
    **{"vtc_cls": 12, "vqtoken": 16, "random": 8},
    **{"tenth": 18, "queries": 14, "codes": 20, "plain": 17},
}


def _bits(n):
    return "1" * n + "0" * (20 - n)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """LoRA at a tenth and at 4 codes, queries for up to 8, VQ-Attention at 4, and no adapters."""
    folder = tmp_path_factory.mktemp("shelf")
    model, _ = load()
    with patch(with_lora(model), "vtc_cls", keep=0.1) as handle:
        hub.save(handle, folder / "tenth", trained_keep=(0.1, 0.1))
    (folder / "tenth" / "recipe.yaml").write_text("command: vlmcompress train lora --out x\n")
    hub.unload(model)
    with patch(with_lora(model), "vqtoken", keep=4) as handle:
        hub.save(handle, folder / "plain", trained_keep=(4, 4))
    hub.unload(model)
    with patch(model, "mqt(max_tokens=16)", keep=8) as handle:
        hub.save(handle, folder / "queries", trained_keep=(1, 8))
    with patch(model, "vqtoken(attention=True)", keep=4) as handle:
        hub.save(handle, folder / "codes", trained_keep=(4, 4))
    with patch(model, "vtc_cls", keep=4) as handle:
        hub.save(handle, folder / "untrained")
    (folder / "begun").mkdir()
    return folder


@pytest.fixture
def plan(shelf):
    return adapters.Plan({"objects": 20, "text": 20}, shelf, ("random", "vtc_cls", "vqtoken"))


@pytest.fixture
def results(plan, tmp_path, monkeypatch):
    """Of answers that are known: the first so many questions are right."""

    def computed(parts, processes):
        for part in parts:
            yield part, _fake(part)

    monkeypatch.setattr(resume, "computed", computed)
    return adapters.compare(plan, tmp_path)


def _fake(part):
    _, name, *tokens = part.name.split("-")
    if name == "full":
        kinds, scenes = ["colour", "count"] * 10, [i // 2 for i in range(20)]
        machine = {"commit": "abc", "cpu": "a CPU", "device": "cpu", "threads": 1}
        machine |= {"torch": "2", "transformers": "5"}
        bare = {"full": _bits(20), "blind": _bits(4), "kinds": kinds, "scenes": scenes}
        return {**bare, "machine": machine}
    if tokens == ["1"] and name == "vqtoken":
        return {"right": None, "tokens": None, "refused": "too few"}
    runs = (
        [_bits(RIGHT[name]), _bits(RIGHT[name] - 2)] if name == "random" else [_bits(RIGHT[name])]
    )
    return {"right": runs, "tokens": float(tokens[0]), "refused": None}


def test_what_is_on_the_shelf(shelf):
    found = {adapter.name: adapter for adapter in shelved(shelf)}
    assert list(found) == ["codes", "plain", "queries", "tenth"]
    assert {name: adapter.kind for name, adapter in found.items()} == {
        "codes": "trained weights",
        "plain": "LoRA",
        "queries": "trained weights",
        "tenth": "LoRA",
    }
    assert [found[name].method for name in found] == ["vqtoken", "vqtoken", "mqt", "vtc_cls"]
    assert found["tenth"].command == "vlmcompress train lora --out x"
    digest = found["tenth"].digest
    (shelf / "tenth" / "results.json").write_text("{}")
    assert found["tenth"].digest == digest != found["codes"].digest


def test_adapters_answer_inside_what_they_were_trained_for(shelf):
    found = {adapter.name: adapter for adapter in shelved(shelf)}
    tenth, queries = found["tenth"], found["queries"]
    assert [tenth.keep_for(tokens, OF) for tokens in (20, 10, 8, 1)] == [0.1, None, None, None]
    assert [queries.keep_for(tokens, OF) for tokens in (20, 8, 1)] == [None, 8, 1]
    assert found["codes"].ends(OF) == {4}

    wide = dataclasses.replace(tenth.found, trained_keep=(0.02, 0.5))
    drawn = dataclasses.replace(tenth, found=wide)
    assert drawn.keep_for(20, OF) == 20 / OF
    assert drawn.keep_for(8, OF) == 8 / OF
    assert drawn.keep_for(4, OF) == 0.02
    assert drawn.keep_for(1, OF) is None


def test_counts_are_those_of_budgets_and_of_adapters_that_meet_none(plan, shelf):
    assert adapters.counts(plan, shelved(shelf), OF) == [20, 10, 8, 4, 1]
    assert adapters.tokens_of_an_image(adapters.WEIGHTS_DIR) == OF


def test_a_shelf_without_adapters(tmp_path, plan):
    with pytest.raises(ConfigError, match="holds no adapter"):
        shelved(tmp_path)


def test_an_adapter_named_like_a_method(plan, shelf, tmp_path):

    shutil.copytree(shelf / "codes", tmp_path / "shelf" / "vqtoken")
    with pytest.raises(ConfigError, match="rename"):
        adapters.compare(dataclasses.replace(plan, shelf=tmp_path / "shelf"), tmp_path / "parts")


def test_differences_are_paired_with_the_best_at_the_same_count(results):
    world = results["worlds"]["objects"]
    assert world["full"][0] == 1
    assert set(world["at"]) == {"20", "10", "8", "4", "1"}
    tenth = world["at"]["20"]["rows"]["tenth"]
    assert world["at"]["20"]["best"] == "vqtoken"
    assert tenth["accuracy"][0] == pytest.approx(0.9)
    assert tenth["over_best"][0] == pytest.approx(0.1)
    assert tenth["over_own"][0] == pytest.approx(0.3)
    assert tenth["over_full"][0] == pytest.approx(-0.1)
    assert world["at"]["8"]["rows"]["queries"]["over_best"][0] == pytest.approx(-0.1)
    assert "over_own" not in world["at"]["8"]["rows"]["queries"]
    assert world["at"]["1"]["best"] == "vtc_cls"  # the other was refused
    assert "vqtoken" not in world["at"]["1"]["rows"]
    assert {row["part"] for row in results["refused"]} == {"objects-vqtoken-1", "text-vqtoken-1"}
    assert world["at"]["20"]["rows"]["random"]["accuracy"][0] == pytest.approx(0.35)
    at = world["at"]["4"]["rows"]
    assert at["codes"]["over_own"][0] == pytest.approx(0.2)
    assert at["codes"]["over_lora"][0] == pytest.approx(0.15)
    assert at["plain"]["over_own"][0] == pytest.approx(0.05)
    assert "over_lora" not in at["plain"] | at["queries"] | tenth
    assert world["at"]["4"]["tuned"] == {"vqtoken": "plain"}
    assert world["at"]["20"]["tuned"] == {"vtc_cls": "tenth"}


def test_tables(results):
    header, rows = adapter_tables.rows(results)
    assert all(len(row) == len(header) for row in rows)
    tenth = next(row for row in rows if row[1].startswith("[tenth]"))
    assert tenth[0] == "20"
    assert tenth[2] == "LoRA"
    assert tenth[3].startswith("90.0 (")
    assert tenth[5] == "4.50"  # 90 % over 20 tokens
    assert [row[1] for row in rows if row[0] == "1"] == [
        *("`vtc_cls`", "`random`", "[queries](queries/README.md)")
    ]
    header, rows = adapter_tables.own_rows(results)
    assert all(len(row) == len(header) for row in rows)
    assert [row[:3] for row in rows] == [
        ["20", "[tenth](tenth/README.md)", "`vtc_cls`"],
        ["4", "[codes](codes/README.md)", "`vqtoken`"],
        ["4", "[codes](codes/README.md)", "[plain](plain/README.md)"],
        ["4", "[plain](plain/README.md)", "`vqtoken`"],
    ]
    assert [row[4].partition(" ")[0] for row in rows[1:]] == ["+20.0", "+15.0", "+5.0"]


def test_the_page_says_the_commands(results):
    page = readme.adapters_region(results)
    assert "vlmcompress train lora --out x\nvlmcompress eval adapters --out " in page
    assert "--questions 20 --text-questions 20" in page
    assert "20 about objects and 20 about text" in page


def test_what_was_asked_is_not_asked_again(results, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "computed", lambda parts, processes: iter(()) if not parts else 1)
    assert adapters.compare(plan, tmp_path) == results
    assert plan.size() == len(list(tmp_path.glob("*.json"))) == 2 * (1 + 5 * 3 + 1 + 3 + 2)


@pytest.mark.slow
def test_a_small_comparison_from_end_to_end(shelf, tmp_path):
    out = tmp_path / "adapters.json"
    words = ["--folder", str(shelf), "--questions", "8", "--text-questions", "0"]
    words += ["--methods", "random,vqtoken", "--budgets", "0.1,8", "--seeds", "1"]
    words += ["--processes", "1", "--parts", str(tmp_path / "parts"), "--json"]
    done = CliRunner().invoke(app, ["eval", "adapters", "--out", str(out), *words])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    (world,) = found["worlds"].values()
    assert found["refused"] == []
    assert {tokens: set(at["rows"]) for tokens, at in world["at"].items()} == {
        "20": {"random", "vqtoken", "tenth"},
        "8": {"random", "vqtoken", "queries"},
        "4": {"random", "vqtoken", "codes", "plain", "queries"},
    }
    for tokens, at in world["at"].items():
        for row in at["rows"].values():
            assert row["tokens"] == float(tokens)
            assert 0 <= row["accuracy"][0] <= 1
    assert str(tmp_path) not in out.read_text()
    assert str(shelf) not in out.read_text()
