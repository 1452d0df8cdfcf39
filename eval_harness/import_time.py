"""Import times beside those of transformers: `python -m eval_harness.import_time`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from eval_harness.rounds import Sample, interleave, summary

_BARE = "import torch, transformers"
_MODEL = f"{_BARE}; from transformers import LlavaForConditionalGeneration"
# What the first `patch(model)` of a LLaVA model imports on top of the function itself.
_PATCHED = (
    "from vlmcompress import patch; import vlmcompress.families.llava, vlmcompress.live.generate, "
    "vlmcompress.methods.connector.vtc_cls"
)
_CLOCKS = ("wall", "cpu")

# The times lie between the start and the end of the statements, without the interpreter's own
# start, which would only bring every ratio nearer to 1.
_TIMED = """\
import json, time
wall, cpu = time.perf_counter(), time.process_time()
{statements}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps({{"wall": wall, "cpu": cpu}}))
"""


@dataclass(frozen=True)
class Comparison:
    """One import of this library, and what it is measured on top of.

    transformers loads most of itself when a name is first asked for, so `base` must have asked for
    what `added` needs: otherwise the ratio charges parts of transformers to this library.

    Attributes:
        name: of the row.
        base: statements on both sides.
        added: statements on one.
    """

    name: str
    base: str
    added: str

    @property
    def both(self) -> str:
        """The statements of the longer side."""
        return f"{self.base}; {self.added}"


COMPARISONS = (
    Comparison("import vlmcompress", _BARE, "import vlmcompress"),
    Comparison("from vlmcompress import patch", _BARE, "from vlmcompress import patch"),
    Comparison("all that patching a LLaVA model imports", _MODEL, _PATCHED),
)


def seconds(statements: str) -> Sample:
    """Wall and processor seconds that statements take in a fresh interpreter."""
    code = _TIMED.format(statements=statements)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: Sample = json.loads(done.stdout)
    return found


def measure(
    repeats: int, warmup: int, timed: Callable[[str], Sample] = seconds
) -> list[dict[str, Any]]:
    """Time every comparison, all sides in turns.

    Args:
        repeats: rounds that count.
        warmup: rounds before them, which fill the caches of files and bytecode.
        timed: gives the seconds that statements take.

    Returns:
        Per comparison `name`, `base`, `added` and, for either clock, both sides' seconds and the
        median over rounds of their ratio.
    """
    statements = dict.fromkeys(s for c in COMPARISONS for s in (c.base, c.both))
    samples = interleave({s: partial(timed, s) for s in statements}, repeats, warmup)
    return [
        {
            "name": one.name,
            "base": one.base,
            "added": one.added,
            **{clock: _compare(samples[one.base], samples[one.both], clock) for clock in _CLOCKS},
        }
        for one in COMPARISONS
    ]


def _compare(base: list[Sample], both: list[Sample], clock: str) -> dict[str, Any]:
    pairs = [(a[clock], b[clock]) for a, b in zip(base, both, strict=True)]
    return {
        "base": summary([a for a, _ in pairs]),
        "both": summary([b for _, b in pairs]),
        "ratio": median(b / a for a, b in pairs),
    }


def main() -> None:
    """Measure, print the results as JSON and write them to a file if asked to."""
    parser = argparse.ArgumentParser(description="Import times beside those of transformers.")
    parser.add_argument("--repeats", type=int, default=11, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    asked = parser.parse_args()
    if asked.repeats < 1 or asked.warmup < 0:
        parser.error(f"repeats={asked.repeats}, warmup={asked.warmup}; allowed: from 1, from 0")
    from eval_harness import machine
    from vlmcompress.cli.output import emit

    results = {
        "machine": machine.environment(),
        "protocol": {"repeats": asked.repeats, "warmup": asked.warmup},
        "imports": measure(asked.repeats, asked.warmup),
    }
    emit(results, "", as_json=True, out=asked.out)


if __name__ == "__main__":
    main()
