"""The curve is drawn, and a missing matplotlib is said so."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from eval_harness import plots
from vlmcompress.core.errors import MissingExtraError


def _results():
    point = {"mean": 0.5, "low": 0.4, "high": 0.6}
    accuracy = {"1.0": {"vtc_cls": point}, "0.1": {"vtc_cls": point, "random": point}}
    return {"n": 8, "accuracy": accuracy, "blind": 0.2}


def test_curve(tmp_path):
    path = plots.plot_curve(_results(), tmp_path / "curve.png")
    with Image.open(path) as picture:
        assert picture.width > 600


def test_lines_rise_with_keep():
    lines = plots._lines(_results()["accuracy"])
    assert [point[0] for point in lines["vtc_cls"]] == [0.1, 1.0]
    assert len(lines["random"]) == 1


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        plots.plot_curve(_results(), tmp_path / "curve.png")
