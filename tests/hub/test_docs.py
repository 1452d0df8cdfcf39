"""The page about adapters: its snippets run, in order, and say what they claim."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.hub import adapters
from tests.hub.server import serving
from vlmcompress.reference import weights

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(adapters.PEFT_WARNING)]


def test_the_snippets_run(reference_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(weights, "WEIGHTS_DIR", reference_folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    space: dict = {}
    with serving() as server:
        constants, place = "huggingface_hub.constants", "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.endpoint)
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + place)
        for snippet in snippets:
            exec(compile(snippet, PAGE.name, "exec", dont_inherit=True), space)
    said = capsys.readouterr().out
    assert "vtc_cls:0.1" in said
    assert "trained for keep from 0.05 to 0.2 (shares of an image's tokens) with 'vtc_cls'" in said
    assert server.repositories["models/user/tenth"].private
    assert set(server.repositories) == {
        *("models/user/tenth", "models/user/tenth-again", "datasets/user/tenth-results")
    }
    assert "| my questions | vtc_cls at 0.1 | accuracy | 0.75 (0.5 to 1) | 4 |" in (
        Path("measured/README.md").read_text()
    )


def test_every_public_name_is_on_the_page():
    from vlmcompress import hub

    page = PAGE.read_text(encoding="utf-8")
    spoken_of = {name for name in hub.__all__ if f"hub.{name}" in page}
    behind = {"About", "learned", "save_learned"}  # of write_card and of from_pretrained
    assert spoken_of | behind == set(hub.__all__)
