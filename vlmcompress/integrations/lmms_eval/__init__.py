"""lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval, 0.7.3 and later 0.7.x).

The model `vlmcompress` and tasks over the questions that `vlmcompress eval run` reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL = "vlmcompress"
TASKS = Path(__file__).with_name("tasks")
"""Folder for lmms-eval's `--include_path`."""


def manifests() -> Any:
    """What the entry point of group `lmms_eval.models` stands for.

    lmms-eval loads the entry points of all packages in one go, and one that raises keeps those
    behind it from loading. So nothing is imported here but what lmms-eval has imported itself.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path=f"{__name__}.model.VLMCompress")
