"""`python -m tests.matrix`: merge the outcomes of all runs into docs/assets/matrix.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.matrix import results


def main() -> int:
    """Write the file and say what is in it; 1 where a cell failed or was not run."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="outcomes of runs")
    parser.add_argument("--out", type=Path, default=results.FILE, help="the file to write")
    given = parser.parse_args()
    outcomes = results.merged(given.results, given.out)
    content = results.table(outcomes, results.passed_earlier(given.out))
    given.out.write_text(results.dumps(content), encoding="utf-8")
    counts = content["counts"]
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    for outcome in outcomes.values():
        if outcome.outcome == "failed":
            print(f"failed: {outcome.cell}: {outcome.reason}")
    return int(any(counts[name] for name in ("failed", "not run", "passed on earlier sources")))


if __name__ == "__main__":
    sys.exit(main())
