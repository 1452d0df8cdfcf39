"""The pages: generated regions are up to date, and made from results files."""

from __future__ import annotations

import json
import re

import pytest

from scripts import readme as script
from tests.docs.pages import PAGES, read
from tests.project import ROOT
from vlmcompress.families import SUPPORTED

REGIONS = {
    "table": "results.json",
    "bench": "bench.json",
    "worlds": "reference_eval.json",
}


def test_576_become_58():
    from vlmcompress.core.keep import count

    assert count(0.1, 576) == 58


@pytest.mark.parametrize("name", PAGES)
def test_pages_have_no_wrapped_markers(name):
    begins = re.findall(r"<!-- (\w+):begin -->", read(name))
    assert begins == re.findall(r"<!-- (\w+):end -->", read(name))


def test_generated_regions_are_up_to_date():
    for path, content in script.documents().items():
        assert path.read_text(encoding="utf-8") == content, f"run `make readme` for {path.name}"


@pytest.mark.parametrize(("region", "file"), REGIONS.items())
def test_regions_without_results_say_how_to_make_them(region, file):
    inside = read("README.md").split(f"<!-- {region}:begin -->")[1].split("<!--")[0]
    if (ROOT / "docs/assets" / file).exists():
        assert "|" in inside
        assert "commit" in inside
    else:
        assert "Run `make" in inside


def test_every_family_is_in_the_table():
    page = read("docs/families.md")
    assert all(f"| `{family}` |" in page for family in SUPPORTED)


def test_results_are_of_this_library():
    path = ROOT / "docs/assets/results.json"
    if not path.exists():
        pytest.skip("no results yet")
    results = json.loads(path.read_text())
    assert results["n"] == 240
    assert {"commit", "torch", "transformers", "cpu"} <= set(results["machine"])
    assert results["commit"]


def test_a_region_is_replaced():
    page = "a <!-- x:begin -->\nold\n<!-- x:end --> b"
    assert script.insert(page, "x", "new") == "a <!-- x:begin -->\nnew\n<!-- x:end --> b"
    with pytest.raises(ValueError, match="markers"):
        script.insert("nothing", "x", "new")


def _machine() -> dict:
    names = ("commit", "torch", "transformers", "cpu", "threads", "device", "shape", "dtype")
    return {**dict.fromkeys(names, "?"), "device": "cpu"}


def test_tables_are_made_from_results():
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6}
    results = {
        "accuracy": {"1.0": {"random": estimate}, "0.1": {"random": estimate}},
        "tokens": {"1.0": 196, "0.1": 20},
        "ttft_ratio": {"1.0": 1.0, "0.1": 0.5},
        "n": 240,
        "blind": 0.25,
        "method": "vtc_cls",
        "machine": _machine(),
    }
    region = script.accuracy_region(results)
    assert "| `random` | 50.0 (40-60) | 50.0 (40-60) |" in region
    assert "| TTFT, relative | 1.00 | 0.50 |" in region
    assert "25.0 without the image" in region


def test_the_bench_table_is_made_from_results():
    costs = {"tokens": 576, "ttft": {"median": 0.5}, "kv_bytes": 2**20}
    row = {**costs, "method": "vtc_cls", "keep": 0.1, "speedup": 2.5, "floor_ratio": 1.01}
    row["ideal_ratio"] = 1.02
    results = {
        "configs": [{**row, "baseline": costs}],
        "machine": _machine(),
        "protocol": {"repeats": 3},
    }
    region = script.bench_region(results)
    assert "| unpatched |  | 576 | 1.00 |  |  |  |" in region
    assert "| `vtc_cls` | 0.1 | 576 | 1.00 | 2.50 | 1.010 | 1.020 |" in region


def test_the_import_table_is_made_from_results():
    clocks = {"wall": {"ratio": 1.014}, "cpu": {"ratio": 1.026}}
    results = {
        "imports": [{"base": "import torch", "added": "import vlmcompress", **clocks}],
        "machine": _machine(),
        "protocol": {"repeats": 11},
    }
    region = script.import_region(results)
    assert "| `import vlmcompress` | `import torch` | 1.01 | 1.03 |" in region
    assert "(`make import-time`): commit ?" in region


def test_importing_is_as_fast_as_promised():
    results = json.loads((ROOT / "docs/assets/import_time.json").read_text(encoding="utf-8"))
    ratios = [row[clock]["ratio"] for row in results["imports"] for clock in ("wall", "cpu")]
    assert len(ratios) == 6
    assert max(ratios) <= 1.15


def test_bars_in_a_cell_do_not_end_it() -> None:
    """In none of the Markdowns that show these tables."""
    import markdown as python_markdown

    from vlmcompress.reference.card import markdown

    text = markdown(["pipeline", "cost"], [["`evit:0.5 | vtc_cls:0.1`", "0.640"], ["`a<b`", "1"]])
    assert text.splitlines()[2] == "| <code>evit:0.5 &#124; vtc_cls:0.1</code> | 0.640 |"
    page = python_markdown.markdown(text, extensions=["tables"])
    assert page.count("<td") == 4
    assert "<code>evit:0.5 &#124; vtc_cls:0.1</code>" in page
