"""The measurement of import times, with times made up."""

from __future__ import annotations

import sys

import pytest

from eval_harness import import_time
from eval_harness.import_time import COMPARISONS, measure, seconds


def test_ratios_are_taken_within_a_round():
    """A round in which the machine is three times as slow changes no ratio."""
    asked = []

    def timed(statements):
        asked.append(statements)
        slow = 3.0 if len(asked) > len(set(asked)) else 1.0
        both = statements in {one.both for one in COMPARISONS}
        return {"wall": slow * (1.1 if both else 1.0), "cpu": slow * (1.2 if both else 1.0)}

    rows = measure(2, 0, timed)
    assert [row["name"] for row in rows] == [one.name for one in COMPARISONS]
    for row in rows:
        assert row["wall"]["ratio"] == pytest.approx(1.1)
        assert row["cpu"]["ratio"] == pytest.approx(1.2)
        assert row["wall"]["base"]["min"] == 1.0


def test_a_statement_shared_by_comparisons_runs_once_a_round():
    asked = []
    measure(3, 1, lambda s: asked.append(s) or {"wall": 1.0, "cpu": 1.0})
    assert len(asked) == 4 * len(set(asked))


def test_seconds_are_those_of_the_statements():
    found = seconds("import time; time.sleep(0.05)")
    assert found["wall"] >= 0.05
    assert found["cpu"] < found["wall"]


def test_no_rounds_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["import_time", "--repeats", "0"])
    with pytest.raises(SystemExit):
        import_time.main()
    assert "repeats=0" in capsys.readouterr().err
