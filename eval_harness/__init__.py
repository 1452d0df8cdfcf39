"""Measures latency and accuracy of compressed vision-language models.

`bench` times a model, `evaluate` asks it questions; both return JSON-ready dicts.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["bench", "build", "evaluate", "example_inputs", "plot_curve"]

_HOMES = {
    "bench": "eval_harness.latency",
    "build": "eval_harness.shapes",
    "evaluate": "eval_harness.accuracy",
    "example_inputs": "eval_harness.shapes",
    "plot_curve": "eval_harness.plots",
}


def __getattr__(name: str) -> Any:
    """Import the public functions only when they are asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
