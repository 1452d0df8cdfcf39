"""Which cases there are, method by method: what the table of methods says of parity."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
#: Where the library keeps it.
PATH = HERE.parents[1] / "vlmcompress" / "methods" / "parity.json"


def cases() -> dict[str, list[str]]:
    """Names of the cases of each method, read from the files themselves."""
    found: dict[str, list[str]] = {}
    for path in sorted(HERE.glob("*.npz")):
        with np.load(path) as data:
            meta = json.loads(str(data["meta"]))
        assert meta["case"] == path.stem
        found.setdefault(meta["method"], []).append(meta["case"])
    return dict(sorted(found.items()))


def as_text() -> str:
    """The file."""
    return json.dumps(cases(), indent=2) + "\n"
