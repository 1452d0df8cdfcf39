"""The package's public names."""

from __future__ import annotations

import pytest

import eval_harness
from eval_harness import accuracy, latency, plots, shapes


def test_public_names():
    assert eval_harness.bench is latency.bench
    assert eval_harness.evaluate is accuracy.evaluate
    assert eval_harness.plot_curve is plots.plot_curve
    assert eval_harness.build is shapes.build
    assert all(hasattr(eval_harness, name) for name in eval_harness.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = eval_harness.nothing
