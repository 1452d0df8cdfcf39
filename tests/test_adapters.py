"""The adapters that lie beside the library: they load with one line and say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vlmcompress import load_adapter
from vlmcompress.reference import load, prompt, samples
from vlmcompress.training.adapter import CARD, RESULTS, card

SHELF = Path(__file__).resolve().parents[1] / "adapters"
FOLDERS = sorted(path for path in SHELF.iterdir() if path.is_dir())
LARGEST = 3 * 2**20  # bytes

every_adapter = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def test_the_thresholds_of_the_reference_model_are_there() -> None:
    assert "atp-reference" in [folder.name for folder in FOLDERS]


@every_adapter
def test_the_card_says_what_the_results_say(folder: Path) -> None:
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    assert (folder / CARD).read_text(encoding="utf-8") == card(results)
    assert results["folder"] == f"adapters/{folder.name}"
    assert results["measured"]["questions"] >= 500
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST


@torch.no_grad()
def test_thresholds_of_the_reference_model_keep_what_their_card_says() -> None:
    folder = SHELF / "atp-reference"
    measured = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["measured"]
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
