"""The pages: snippets run, links lead somewhere, generated regions are up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from scripts import readme as script
from tests import tiny
from vlmcompress.families import SUPPORTED
from vlmcompress.reference import weights

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
REGIONS = {
    "table": "results.json",
    "bench": "bench.json",
    "worlds": "reference_eval.json",
}


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _snippets(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", _read(name), flags=re.DOTALL | re.MULTILINE)


def _reference():
    """The reference model, or one of its shape without training where it has no weights yet."""
    if (weights.WEIGHTS_DIR / "config.json").exists():
        return weights.load()
    from vlmcompress.reference.model import build_model
    from vlmcompress.reference.tokenizer import build_processor

    return build_model().eval(), build_processor()


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Where the README's snippets run: checkpoints stand for the reference model.

    A snippet that loads a large checkpoint gets the small model instead; nothing else is replaced.
    """
    import transformers

    from vlmcompress import reference

    model, processor = _reference()
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    asked = []

    def stand_in(value):
        def from_pretrained(name, **options):
            asked.append(name)
            return value

        return staticmethod(from_pretrained)

    auto = transformers.AutoModelForImageTextToText
    monkeypatch.setattr(auto, "from_pretrained", stand_in(model))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", stand_in(processor))
    monkeypatch.setattr(reference, "load", lambda: (model, processor), raising=False)
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((300, 200), 80).convert("RGB").save("photo.jpg")
    return model, asked


@pytest.mark.slow
def test_the_readmes_snippets_run_in_order(world, capsys):
    model, asked = world
    space: dict = {}
    for snippet in _snippets("README.md"):
        exec(compile(snippet, "README.md", "exec", dont_inherit=True), space)
    assert "196 -> 20 tokens/image" in capsys.readouterr().out
    assert set(asked) == {"llava-hf/llava-1.5-7b-hf"}
    assert Image.open("kept.png").size == (224, 224)
    assert space["ids"].shape[0] == 1
    assert "generate" not in model.__dict__  # every handle was taken off


def test_the_first_snippet_is_three_lines():
    lines = [line for line in _snippets("README.md")[0].splitlines() if line]
    assert len([line for line in lines if "import" not in line]) == 3


def test_576_become_58():
    from vlmcompress.core.keep import count

    assert count(0.1, 576) == 58


def test_contributings_method_works():
    import torch

    from vlmcompress import patch

    space: dict = {"__name__": "norm"}
    (snippet,) = re.findall(r"^   ```python\n(.*?)^   ```", _read("CONTRIBUTING.md"), re.S | re.M)
    source = re.sub(r"^   ", "", snippet, flags=re.M)
    exec(compile(source, "CONTRIBUTING.md", "exec", dont_inherit=True), space)
    model = tiny.build("llava")
    batch = tiny.inputs(model, [tiny.Prompt(images=1, text=5)])
    with patch(model, space["Norm"](), keep=5) as handle, torch.no_grad():
        model(**batch)
        assert handle.last.tokens_after == (5,)


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_exist(name):
    page = _read(name)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page) + re.findall(r'src="([^"]+)"', page)
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not ((ROOT / name).parent / target).exists()]
    if not (ROOT / "docs/assets/results.json").exists():
        missing = [target for target in missing if "docs/assets/" not in target]
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_pages_have_no_wrapped_markers(name):
    begins = re.findall(r"<!-- (\w+):begin -->", _read(name))
    assert begins == re.findall(r"<!-- (\w+):end -->", _read(name))


def test_commands_exist():
    from typer.testing import CliRunner

    from vlmcompress.cli import app

    for line in re.findall(r"^vlmcompress [^\n#]*", _read("README.md"), flags=re.M):
        words = re.split(r"\s+--|\s+\S*/", line)[0].split()[1:]
        command = [word for word in words if word.isalpha()]
        assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0, line


def test_make_targets_exist():
    makefile = _read("Makefile")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", _read("README.md"), flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_generated_regions_are_up_to_date():
    for path, content in script.documents().items():
        assert path.read_text(encoding="utf-8") == content, f"run `make readme` for {path.name}"


@pytest.mark.parametrize(("region", "file"), REGIONS.items())
def test_regions_without_results_say_how_to_make_them(region, file):
    inside = _read("README.md").split(f"<!-- {region}:begin -->")[1].split("<!--")[0]
    if (ROOT / "docs/assets" / file).exists():
        assert "|" in inside
        assert "commit" in inside
    else:
        assert "Run `make" in inside


def test_every_family_is_in_the_table():
    page = _read("docs/families.md")
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
        "ttft": {"1.0": 0.02, "0.1": 0.01},
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
    results = {
        "configs": [{**row, "baseline": costs}],
        "machine": _machine(),
        "protocol": {"repeats": 3},
    }
    region = script.bench_region(results)
    assert "| unpatched |  | 576 | 1.00 |  |  |" in region
    assert "| `vtc_cls` | 0.1 | 576 | 1.00 | 2.50 | 1.010 |" in region


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
