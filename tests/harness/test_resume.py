"""Long measurements: parts are kept, used again where they hold, and errors lose nothing."""

from __future__ import annotations

import json

import pytest

from eval_harness import resume
from eval_harness.resume import Part

CALLS = []


def square(x):
    CALLS.append(x)
    if x < 0:
        raise ValueError(f"{x} is negative")
    return {"value": (x, x * x)}


def _parts(*numbers, version=1):
    return [Part(f"part-{x}", {"version": (version,)}, square, (x,)) for x in numbers]


@pytest.fixture(autouse=True)
def _forget():
    del CALLS[:]


def test_results_come_in_order_and_as_json(tmp_path):
    seen = []
    found = resume.measured(_parts(3, 1, 2), tmp_path / "new", progress=seen.append)
    assert list(found) == ["part-3", "part-1", "part-2"] == seen
    assert found["part-3"] == {"value": [3, 9]}


def test_only_what_is_missing_damaged_or_of_another_identity_is_measured(tmp_path):
    first = resume.measured(_parts(1, 2, 3), tmp_path)
    (tmp_path / "part-2.json").write_text("{")
    (tmp_path / "part-3.json").unlink()
    del CALLS[:]
    seen = []
    assert resume.measured(_parts(1, 2, 3), tmp_path, progress=seen.append) == first
    assert CALLS == [2, 3]
    assert seen == ["part-1", "part-2", "part-3"]
    resume.measured(_parts(1, version=2), tmp_path)
    assert CALLS == [2, 3, 1]


@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_keeps_everything_else(tmp_path, processes):
    with pytest.raises(ValueError, match="negative"):
        resume.measured(_parts(1, -1, 2), tmp_path, processes=processes)
    assert json.loads((tmp_path / "part-1.json").read_text())["result"] == {"value": [1, 1]}
    assert json.loads((tmp_path / "part-2.json").read_text())["result"] == {"value": [2, 4]}
    assert not list(tmp_path.glob("*.tmp"))


def test_processes_do_the_same(tmp_path):
    alone = resume.measured(_parts(1, 2), tmp_path / "alone")
    assert resume.measured(_parts(1, 2), tmp_path / "many", processes=2) == alone
    assert CALLS == [1, 2]
