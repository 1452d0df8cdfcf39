"""What results come from: the files of a method, versions, and the file that they end in."""

from __future__ import annotations

import inspect
import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from eval_harness.asking import FULL
from eval_harness.controls import ORACLES
from eval_harness.replay import built


def source(method: str) -> str:
    """Hash of the files that define a method, without what they import; empty for controls."""
    if method == FULL or method in ORACLES:
        return ""
    kinds = {type(stage) for stage in built(method).templates}
    files = sorted({inspect.getfile(kind) for kind in kinds})
    return sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Of what computes the answers."""
    import torch
    import transformers

    import vlmcompress

    modules = {"vlmcompress": vlmcompress, "torch": torch, "transformers": transformers}
    return {name: module.__version__ for name, module in modules.items()}


def save(results: dict[str, Any], path: str | Path) -> Path:
    """Write results as JSON, one line per list, folders included."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    path.write_text(re.sub(r"\s*\n\s*(?=[^\[\]{}]*\])", " ", text) + "\n", encoding="utf-8")
    return path
