"""What an adapter brings is measured as it lies in its folder, in both worlds, and told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.hub import adapters
from tests.seam.equalities import traces
from vlmcompress import hub, patch
from vlmcompress.cli import app
from vlmcompress.core.errors import ConfigError
from vlmcompress.reference import load, samples
from vlmcompress.training import recipe
from vlmcompress.training.measure import Measurable, before_and_after

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(adapters.PEFT_WARNING),
]
ESTIMATES = {"before", "after", "gain", "over_full"}


def run(*words: str) -> Any:
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of one step, not measured."""
    folder = tmp_path_factory.mktemp("shelf") / "few"
    words = ["--method", "vtc_cls", "--keep", "4:16", "--steps", "1", "--batch", "2", "--rank", "2"]
    results = run("train", "lora", "--out", str(folder), *words, "--questions", "0")
    assert "measured" not in results
    assert "Measured" not in (folder / "README.md").read_text()
    return folder


def test_an_adapter_is_measured_later(made: Path) -> None:
    before = (made / "recipe.yaml").read_text()
    first = json.loads((made / "results.json").read_text())
    results = run("eval", "adapter", str(made), "--questions", "9")
    assert results == json.loads((made / "results.json").read_text())
    assert (made / "recipe.yaml").read_text() == before
    assert results["curve"] == first["curve"]
    trained, measured = results["command"].splitlines()
    assert trained == recipe.recipe_of(made)["command"] == first["command"]
    assert measured == "vlmcompress eval adapter adapters/few --questions 9"
    worlds = results["measured"]["worlds"]
    assert set(worlds) == {"objects", "text"}
    for world in worlds.values():
        assert world["questions"] == 9
        assert set(world["at"]) == {"4", "8", "16"}
        for row in world["at"].values():
            assert set(row) == {*ESTIMATES, "recovered"}
            gain = row["after"]["mean"] - row["before"]["mean"]
            assert row["gain"]["mean"] == pytest.approx(gain)
    assert worlds["objects"]["images"] != worlds["text"]["images"]


def test_cards_tell_the_worlds_apart(made: Path) -> None:
    results = run("eval", "adapter", str(made), "--questions", "9", "--keeps", "4")
    card = (made / "README.md").read_text()
    assert "license: apache-2.0" in card
    for world, name in (("objects", "drawn objects"), ("text", "drawn texts")):
        after = results["measured"]["worlds"][world]["at"]["4"]["after"]
        shown = f"{after['mean']:.4g} ({after['low']:.4g} to {after['high']:.4g})"
        row = f"| {name}, test split | keep 4, with the adapter | accuracy | {shown} | 9 |"
        assert row in card
    assert f"of {results['machine']['date']}" in card
    assert "train lora --out adapters/few" in card
    assert "eval adapter adapters/few --questions 9 --keeps 4\n" in card


def test_what_changes_nothing_gains_nothing(tmp_path: Path) -> None:
    """And the model is as it was."""
    model, processor = load()
    with patch(model, "vtc_cls", keep=0.1) as handle:
        hub.save(handle, tmp_path)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    asked = {"objects": list(samples("test", 8)), "text": list(samples("test", 6, world="text"))}
    found = before_and_after(model, processor, tmp_path, asked)
    for world in found["worlds"].values():
        assert world["at"]["None"]["gain"] == {"mean": 0, "low": 0, "high": 0}
        assert world["full"] == world["full_adapted"]
    assert found["worlds"]["objects"]["full"]["mean"] > 0.7
    assert traces(model) == []
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_adapters_that_spoil_answers_are_seen_to(tmp_path: Path) -> None:
    """What lies in the folder is asked: LoRA of noise."""
    model, processor = load()
    with patch(adapters.with_lora(model), "vtc_cls", keep=0.1) as handle:
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data.mul_(20)
        hub.save(handle, tmp_path, trained_keep=(0.1, 0.1))
    hub.unload(model)
    asked = {"objects": list(samples("test", 8))}
    (world,) = before_and_after(model, processor, tmp_path, asked)["worlds"].values()
    assert world["at"]["0.1"]["gain"]["mean"] < -0.3
    assert world["full_adapted"]["mean"] < world["full"]["mean"] - 0.3
    assert traces(model) == []


def test_budgets_are_as_open_as_in_training(made: Path, tmp_path: Path) -> None:
    found = Measurable.of(made)
    assert (found.trained, found.plain, found.learns, found.lora) == (
        *("vtc_cls", "vtc_cls"),
        *(False, True),
    )
    assert found.keeps == (4, 8, 16)
    model, _ = load()
    with patch(model, "mqt(max_tokens=16)", keep=4) as handle:
        hub.save(handle, tmp_path, trained_keep=(1, 4))
    learnt = Measurable.of(tmp_path)
    assert learnt.plain == "mqt(max_tokens=16)"
    assert str(tmp_path / "mqt.safetensors") in learnt.trained
    assert learnt.learns
    assert not learnt.lora
    assert learnt.keeps == (1, 2, 4)


@pytest.mark.parametrize("text", ["a: [", "- 1\n"])
def test_a_broken_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        recipe.recipe_of(tmp_path)
    assert recipe.recipe_of(tmp_path / "nothing") == {}


def test_what_is_no_adapter_is_said_at_once(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["eval", "adapter", str(tmp_path)])
    assert done.exit_code == 1
    assert "is no adapter" in done.output
