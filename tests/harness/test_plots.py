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


def test_learning_curve(tmp_path):
    curve = [
        {"stage": "tower", "minutes": 1.0, "patches": {"colour": 0.2}},
        {"stage": "tower", "minutes": 3.0, "patches": {"colour": 0.9}},
        {"stage": "joint", "minutes": 1.0, "training": {"count": 0.5}},
        {"stage": "joint", "minutes": 2.0, "validation": {"all@196": {"count": 0.7}, "cls@20": {}}},
    ]
    log = {"stages": {"tower": {}, "joint": {}}, "curve": curve}
    assert plots._learning(curve, "tower") == {"colour": [(1.0, 0.2), (3.0, 0.9)]}
    assert plots._learning(curve, "joint") == {"count": [(2.0, 0.7)]}
    with Image.open(plots.plot_learning(log, tmp_path / "learning.png")) as picture:
        assert picture.width > 900
        height = picture.height
    with Image.open(plots.plot_learning({**log, "before": [log]}, tmp_path / "two.png")) as picture:
        assert picture.height == 2 * height


def test_lines_rise_with_keep():
    lines = plots._lines(_results()["accuracy"])
    assert [point[0] for point in lines["vtc_cls"]] == [0.1, 1.0]
    assert len(lines["random"]) == 1


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        plots.plot_curve(_results(), tmp_path / "curve.png")
