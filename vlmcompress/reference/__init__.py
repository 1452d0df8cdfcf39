"""The small vision-language model that ships with the library, and the scenes it is asked about.

``load()`` returns the model and its processor, ``samples()`` questions with answers, ``train()``
makes the weights from nothing on two CPU cores.
"""

from __future__ import annotations

import importlib

_PLACES = {
    "KINDS": "questions",
    "Sample": "data",
    "TEXT_KINDS": "text_questions",
    "TextHead": "text_head",
    "WEIGHTS_DIR": "weights",
    "export": "exporting",
    "load": "weights",
    "load_text_head": "weights",
    "prompt": "tokenizer",
    "samples": "data",
    "train": "training",
}
__all__ = [
    "KINDS",
    "TEXT_KINDS",
    "WEIGHTS_DIR",
    "Sample",
    "TextHead",
    "export",
    "load",
    "load_text_head",
    "prompt",
    "samples",
    "train",
]


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: scenes need no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
