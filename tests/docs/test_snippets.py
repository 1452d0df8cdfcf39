"""Python on the pages runs, in its order, and does what the pages say."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.docs import worlds
from tests.docs.pages import PAGES, blocks
from vlmcompress import patch
from vlmcompress.reference import weights

# peft asks transformers by a name that transformers is about to drop.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def check_readme(space: dict[str, Any], said: str) -> None:
    assert "196 -> 20 tokens/image" in said
    assert Image.open("kept.png").size == (224, 224)
    assert space["ids"].shape[0] == 1


def check_first_patch(space: dict[str, Any], said: str) -> None:
    assert said.splitlines()[1].startswith("196 -> 20 tokens/image")
    assert Image.open("kept.png").size == (224, 224)
    assert "generate" not in space["model"].__dict__


def check_adapters(space: dict[str, Any], said: str) -> None:
    assert "vtc_cls:0.1" in said
    assert "trained for keep from 0.05 to 0.2 (shares of an image's tokens) with 'vtc_cls'" in said
    assert space["repositories"]["models/user/tenth"].private
    assert set(space["repositories"]) == {
        *("models/user/tenth", "models/user/tenth-again", "datasets/user/tenth-results")
    }
    assert "| my questions | vtc_cls at 0.1 | accuracy | 0.75 (0.5 to 1) | 4 |" in (
        Path("measured/README.md").read_text()
    )


def check_contributing(space: dict[str, Any], said: str) -> None:
    model = tiny.build("llava")
    batch = tiny.inputs(model, [tiny.Prompt(images=1, text=5)])
    with patch(model, space["Norm"](), keep=5) as handle, torch.no_grad():
        model(**batch)
        assert handle.last.tokens_after == (5,)


def check_many_devices(space: dict[str, Any], said: str) -> None:
    assert space["handle"].last.tokens_after == (20,)
    assert space["ids"].shape[1] > space["inputs"]["input_ids"].shape[1]
    other = space["load"]()[0]
    space["fully_shard"](other)
    space["register_fsdp_forward_method"](other, "generate")
    with (
        patch(other, keep=0.1),  # in the other order
        pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"),
    ):
        other.generate(**space["inputs"], max_new_tokens=1)


def check_training(space: dict[str, Any], said: str) -> None:
    assert all(p.grad is not None for p in space["optimizer"].param_groups[0]["params"])
    assert "generate" not in space["model"].__dict__


def check_tuning(space: dict[str, Any], said: str) -> None:
    assert space["handle"].config.to_spec() == "tome_tower:0.5 | vtc_cls:0.25"


CHECKS = {
    "README.md": check_readme,
    "CONTRIBUTING.md": check_contributing,
    "docs/adapters.md": check_adapters,
    "docs/first-patch.md": check_first_patch,
    "docs/many-devices.md": check_many_devices,
    "docs/training.md": check_training,
    "docs/tuning.md": check_tuning,
}


def test_worlds_and_checks_are_of_pages():
    assert {*worlds.WORLDS, *CHECKS} <= set(WITH_PYTHON)


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_snippets_run(page, reference_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(weights, "WEIGHTS_DIR", reference_folder)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("snippets")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look it up
    place = worlds.Place(tmp_path, monkeypatch)
    with torch.random.fork_rng(devices=[]), worlds.WORLDS.get(page, worlds.nothing)(place) as names:
        torch.manual_seed(0)
        names["__name__"] = module.__name__
        for number, code in enumerate(blocks(page, "python"), start=1):
            exec(compile(code, f"{page}, snippet {number}", "exec", dont_inherit=True), names)
    if page in CHECKS:
        CHECKS[page](names, capsys.readouterr().out)


def test_the_first_snippet_is_three_lines():
    lines = [line for line in blocks("README.md", "python")[0].splitlines() if line]
    assert len([line for line in lines if "import" not in line]) == 3
