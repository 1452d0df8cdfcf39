"""The adapters that lie beside the library: they load with one line and say what was measured."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from scripts import adapters as script
from scripts import readme
from tests.hub.adapters import PEFT_WARNING
from tests.project import ROOT
from tests.seam.equalities import traces
from vlmcompress import hub, load_adapter
from vlmcompress.cli import app
from vlmcompress.hub.about import of_folder
from vlmcompress.hub.cards import table
from vlmcompress.hub.folder import CARD, PEFT_WEIGHTS, RECIPE, RESULTS, read
from vlmcompress.hub.results import evaluations
from vlmcompress.reference import load, prompt, samples
from vlmcompress.training.recipe import recipe_of

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)
SHELF = ROOT / "adapters"
FOLDERS = sorted(path for path in SHELF.iterdir() if path.is_dir())
LARGEST = 3 * 2**20  # bytes

every_adapter = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return found


def test_the_thresholds_of_the_reference_model_are_there() -> None:
    assert "atp-reference" in [folder.name for folder in FOLDERS]


@every_adapter
def test_every_folder_is_whole_and_small(folder: Path) -> None:
    assert script.lacking(folder) == []
    assert {RECIPE, RESULTS, CARD} <= set(read(folder).files)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST
    plan = recipe_of(folder)["plan"]
    assert read(folder).lora == bool(plan.get("rank") or plan.get("lora"))
    for name in (RECIPE, RESULTS, CARD):
        assert not re.search(r"/(home|tmp|root|work)/", (folder / name).read_text(encoding="utf-8"))


@every_adapter
def test_the_numbers_of_the_card_are_those_of_the_results(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    hub.write_card(copy, of_folder(copy))
    text = (folder / CARD).read_text(encoding="utf-8")
    assert (copy / CARD).read_text(encoding="utf-8") == text
    found = evaluations(results_of(folder))
    assert found
    assert all((each.questions or 0) >= 500 for each in found)
    assert all(line in text for line in table(found))
    assert "license: apache-2.0" in text


@every_adapter
def test_the_recipe_says_the_command(folder: Path) -> None:
    command = recipe_of(folder)["command"]
    assert results_of(folder)["command"].splitlines()[0] == command
    assert command in (folder / CARD).read_text(encoding="utf-8")
    words = shlex.split(command)
    assert words[:2] == ["vlmcompress", "train"]
    assert words[words.index("--out") + 1] == f"adapters/{folder.name}"
    kind: Any = get_command(app).commands["train"].commands[words[2]]  # type: ignore[attr-defined]
    kind.make_context("train", words[3:])  # refuses what it does not know
    assert script.training(folder, Path("elsewhere"))[4] == "elsewhere"


@pytest.mark.slow
@every_adapter
def test_it_loads_with_one_line(folder: Path) -> None:
    model, processor = load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (sample,) = samples("test", 1)
    asked = prompt(processor, sample.question)
    inputs = processor(text=asked, images=sample.image, return_tensors="pt")
    handle = load_adapter(model, folder, processor=processor)
    assert handle.config.trained_keep == read(folder).config.trained_keep
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert handle.last is not None
    assert handle.last.tokens_before == (196,)
    hub.unload(model)
    assert traces(model) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_thresholds_of_the_reference_model_keep_what_their_card_says() -> None:
    folder = SHELF / "atp-reference"
    measured = results_of(folder)["measured"]
    model, processor = load()
    asked = list(samples("test", 16))
    inputs = processor(
        text=[prompt(processor, sample.question) for sample in asked],
        images=[sample.image for sample in asked],
        padding=True,
        return_tensors="pt",
    )
    with load_adapter(model, folder) as handle:
        model(**inputs)
        assert handle.last is not None
        assert handle.last.average_keep == pytest.approx(measured["average_keep"], abs=0.05)


def test_the_table_speaks_of_these_adapters() -> None:
    """Of every one that was trained for a budget, with the command of its recipe."""
    if not readme.ADAPTERS.exists():
        pytest.skip("no results yet: make adapters")
    found = json.loads(readme.ADAPTERS.read_text(encoding="utf-8"))
    limited = [folder for folder in FOLDERS if read(folder).config.trained_keep is not None]
    assert set(found["adapters"]) == {folder.name for folder in limited}
    page = (SHELF / "README.md").read_text(encoding="utf-8")
    for folder in limited:
        row = found["adapters"][folder.name]
        assert row["command"] == recipe_of(folder)["command"]
        assert row["trained_keep"] == list(read(folder).config.trained_keep or ())
        assert f"[{folder.name}]({folder.name}/README.md)" in page
        assert row["command"] in page
    for world in found["worlds"].values():
        for folder in limited:
            assert any(folder.name in at["rows"] for at in world["at"].values())


# What `make adapters` does


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shelf with the thresholds alone, and another place to train in."""
    monkeypatch.setattr(script, "BUILD", tmp_path / "build")
    shutil.copytree(SHELF / "atp-reference", tmp_path / "shelf" / "atp-reference")
    return tmp_path / "shelf"


def test_what_is_there_is_not_made_again(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["adapters.py", "--shelf", str(shelf)])
    monkeypatch.setattr(script, "_run", None)
    script.main()


def test_what_is_missing_is_trained_then_measured(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = shelf / "atp-reference", []
    weights = (folder / "atp.safetensors").read_bytes()
    (folder / "atp.safetensors").unlink()
    assert script.lacking(folder) == ["atp.safetensors"]

    def run(words: list[str]) -> None:
        ran.append(words)
        if words[1] == "train":
            out = Path(words[words.index("--out") + 1])
            shutil.copytree(SHELF / "atp-reference", out)
            (out / RESULTS).write_text("{}")
            (out / "log.jsonl").write_text("")

    monkeypatch.setattr(script, "_run", run)
    monkeypatch.setattr("sys.argv", ["adapters.py", "--shelf", str(shelf), "--measure", "--seed 1"])
    script.main()
    assert (folder / "atp.safetensors").read_bytes() == weights
    assert not (folder / "log.jsonl").exists()
    assert not (script.BUILD / "atp-reference").exists()
    trained, measured = ran
    assert (
        shlex.join(trained).replace(str(script.BUILD), "adapters") == (recipe_of(folder)["command"])
    )
    assert measured == ["vlmcompress", "eval", "adapter", str(folder), "--seed", "1"]


def test_weights_that_another_training_starts_from_come_first(shelf: Path) -> None:
    text = (shelf / "atp-reference" / RECIPE).read_text(encoding="utf-8")
    for name, start in (("a", "adapters/c/x.safetensors"), ("b", "x"), ("c", "adapters/b/y")):
        (shelf / name).mkdir()
        changed = re.sub("(?m)^command: ", f"command: vlmcompress --method {start} ", text)
        (shelf / name / RECIPE).write_text(changed, encoding="utf-8")
    names = [folder.name for folder in script.ordered(shelf)]
    assert sorted(names) == ["a", "atp-reference", "b", "c"]
    assert names.index("b") < names.index("c") < names.index("a")


def test_lora_belongs_to_a_recipe_with_a_rank(shelf: Path) -> None:
    folder = shelf / "atp-reference"
    text = (folder / RECIPE).read_text(encoding="utf-8")
    (folder / RECIPE).write_text(text.replace("lora: 0", "lora: 8"), encoding="utf-8")
    assert script.lacking(folder) == [PEFT_WEIGHTS]
    (folder / "vlmcompress_config.json").unlink()
    assert "is no adapter" in script.lacking(folder)[0]
