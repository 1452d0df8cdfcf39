"""What lies in the notebooks; `make notebooks` runs them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.project import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST_PICTURE, ALL = 150_000, 1_500_000  # bytes
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Any, kind: str) -> list[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


@every_notebook
def test_they_were_run_in_their_order_and_nothing_failed(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not [cell for cell in code if not "".join(cell["source"]).strip()]


@every_notebook
def test_outputs_name_no_place_of_a_machine(path):
    text = json.dumps([cell["outputs"] for cell in cells(path, "code")])
    assert not re.findall(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt)/\S+", text)


@every_notebook
def test_prose_quotes_no_result(path):
    """What was measured stands in outputs, which are made anew."""
    prose = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"\]\([^)]*\)|`[^`]*`", "", prose))
    assert set(numbers) <= {"5"}  # the error probability that tune promises


@every_notebook
def test_links_lead_somewhere(path):
    prose = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    targets = re.findall(r"\]\(([^)#]+)", prose)
    assert targets
    assert not [target for target in targets if not (path.parent / target).exists()]


def test_there_are_three_and_they_are_small():
    assert len(NOTEBOOKS) == 3
    assert sum(path.stat().st_size for path in NOTEBOOKS) < ALL
    for path in NOTEBOOKS:
        data = [o.get("data", {}) for cell in cells(path, "code") for o in cell["outputs"]]
        pictures = [one[kind] for one in data for kind in one if kind.startswith("image/")]
        assert pictures
        assert max(len("".join(picture)) for picture in pictures) < LARGEST_PICTURE
