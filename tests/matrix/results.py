"""Outcomes of cells: written as they come, merged, and put into the file that is committed."""

from __future__ import annotations

import itertools
import json
import string
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import vlmcompress
from tests.matrix import fingerprint
from tests.matrix.cells import Cell, every_cell
from tests.seam import matrix

#: Where a run leaves its outcomes; git ignores it.
FOLDER = fingerprint.ROOT / "build" / "matrix"
#: What is committed.
FILE = fingerprint.ROOT / "docs" / "assets" / "matrix.json"

PASSED, EARLIER, FAILED, NOT_RUN, NO_CELL = ".", ",", "F", "?", "-"
#: Signs for reasons of exemptions and skips.
SIGNS = string.ascii_lowercase + string.ascii_uppercase.replace(FAILED, "")


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: its name.
        fingerprint: of what it depended on.
        outcome: `skipped` is said of a machine that cannot run it.
        reason: of a skip or a failure.
        seconds: how long it took.
    """

    cell: str
    fingerprint: str
    outcome: Literal["passed", "failed", "skipped"]
    reason: str = ""
    seconds: float = 0.0


def append(folder: Path, writer: str, outcome: Outcome) -> None:
    """Add one line to the file of a writer (each process has its own), at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{writer}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def read(folder: Path) -> dict[str, Outcome]:
    """The outcomes of all writers that are of the present sources; a pass outweighs the rest.

    A line that was cut off when its process was killed is passed over.
    """
    rank = {"skipped": 0, "failed": 1, "passed": 2}
    current = {str(cell): fingerprint.of_pair(cell.method, cell.family) for cell in every_cell()}
    found: dict[str, Outcome] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            outcome = _parse(line)
            if outcome is None or current.get(outcome.cell) != outcome.fingerprint:
                continue
            before = found.get(outcome.cell)
            if before is None or rank[outcome.outcome] >= rank[before.outcome]:
                found[outcome.cell] = outcome
    return found


def _parse(line: str) -> Outcome | None:
    try:
        return Outcome(**json.loads(line))
    except (json.JSONDecodeError, TypeError):
        return None


def committed(file: Path = FILE) -> dict[str, Outcome]:
    """The passes and skips in the committed file that are of the present sources."""
    if not file.exists():
        return {}
    return {o.cell: o for o in _outcomes(json.loads(file.read_text(encoding="utf-8")))}


def passed_earlier(file: Path = FILE) -> frozenset[str]:
    """Cells that passed according to the committed file, whatever sources that was of."""
    if not file.exists():
        return frozenset()
    table = json.loads(file.read_text(encoding="utf-8"))
    return frozenset(
        str(cell)
        for method, families in table["results"].items()
        for family, row in families.items()
        for cell, sign in _signs(table, method, family, row)
        if sign in (PASSED, EARLIER)
    )


def _signs(
    table: Mapping[str, Any], method: str, family: str, row: Mapping[str, Any]
) -> Iterable[tuple[Cell, str]]:
    for kernel, text in zip(table["axes"]["kernel"], row["outcomes"], strict=True):
        for dtype, signs in zip(table["axes"]["dtype"], text.split(), strict=True):
            for equality, sign in zip(table["axes"]["equality"], signs, strict=True):
                yield Cell(family, kernel, dtype, method, equality), sign


def _outcomes(table: Mapping[str, Any]) -> Iterable[Outcome]:
    for method, families in table["results"].items():
        for family, row in families.items():
            if not _is_current(method, family, row["fingerprint"]):
                continue
            for cell, sign in _signs(table, method, family, row):
                if sign == PASSED:
                    yield Outcome(str(cell), row["fingerprint"], "passed")
                elif sign in table["reasons"] and cell.exempt is None:
                    reason = table["reasons"][sign]
                    yield Outcome(str(cell), row["fingerprint"], "skipped", reason)


def _is_current(method: str, family: str, known: str) -> bool:
    there = (family, method) in matrix.everything()
    return there and fingerprint.of_pair(method, family) == known


def merged(folder: Path = FOLDER, file: Path = FILE) -> dict[str, Outcome]:
    """What is known of the present sources: the runs' outcomes over those committed."""
    return {**committed(file), **read(folder)}


def passed(outcomes: Mapping[str, Outcome]) -> set[str]:
    """Names of cells that need not run again."""
    return {name for name, outcome in outcomes.items() if outcome.outcome == "passed"}


def table(
    outcomes: Mapping[str, Outcome], earlier: Collection[str] = frozenset()
) -> dict[str, Any]:
    """The content of the committed file: versions, axes, exemptions and a sign per cell.

    `results[method][family]["outcomes"]` has one text per kernel, with one word per dtype, with one
    sign per equality, all in the order of `axes`: `.` passed, `,` passed on earlier sources and has
    not run since, `F` failed, `?` not run, `-` no cell of the matrix, a letter for a reason in
    `reasons`.

    Args:
        outcomes: of cells on the present sources.
        earlier: cells that passed before.
    """
    cells = every_cell()
    reasons = [cell.exempt for cell in cells]
    reasons += [o.reason for o in outcomes.values() if o.outcome == "skipped"]
    sign_of = dict(zip(dict.fromkeys(r for r in reasons if r), SIGNS, strict=False))
    signs = {cell: _sign(cell, outcomes.get(str(cell)), sign_of) for cell in cells}
    for cell, sign in signs.items():
        if sign == NOT_RUN and str(cell) in earlier:
            signs[cell] = EARLIER
    return {
        "about": "Outcomes of the full matrix, made by `make test-matrix`.",
        "versions": {"vlmcompress": vlmcompress.__version__, **fingerprint.versions()},
        "lists": fingerprint.of_lists(),
        "axes": axes(),
        "counts": _counts(signs, sign_of),
        "reasons": {sign: reason for reason, sign in sign_of.items()},
        "exemptions": [asdict(exemption) for exemption in matrix.EXEMPT],
        "absent": _absent(),
        "results": {
            method: {
                family: _row(method, family, signs)
                for family, name in matrix.everything()
                if name == method
            }
            for method in matrix.names()
        },
    }


def axes() -> dict[str, Any]:
    """The axes of the matrix."""
    return {
        "method": matrix.names(),
        "family": list(matrix.FAMILIES),
        "kernel": list(matrix.KERNELS),
        "dtype": list(matrix.DTYPES),
        "positions": list(matrix.POSITIONS),
        "budget": {stage: list(keeps) for stage, keeps in matrix.BUDGETS.items()},
        "equality": {**matrix.EQUALITIES},
    }


def _sign(cell: Cell, outcome: Outcome | None, sign_of: Mapping[str, str]) -> str:
    if cell.exempt is not None:
        return sign_of[cell.exempt]
    if outcome is None:
        return NOT_RUN
    if outcome.outcome == "skipped":
        return sign_of[outcome.reason]
    return PASSED if outcome.outcome == "passed" else FAILED


def _counts(signs: Mapping[Cell, str], sign_of: Mapping[str, str]) -> dict[str, int]:
    names = {
        PASSED: "passed",
        EARLIER: "passed on earlier sources",
        FAILED: "failed",
        NOT_RUN: "not run",
    }
    kinds = Counter(
        "exempt" if cell.exempt is not None else names.get(sign, "skipped")
        for cell, sign in signs.items()
    )
    return {name: kinds[name] for name in (*names.values(), "skipped", "exempt")}


def _absent() -> dict[str, dict[str, list[str]]]:
    """Reasons why methods do not exist on families: {reason: {method: families}}."""
    found: dict[str, dict[str, list[str]]] = {}
    for method, family in itertools.product(matrix.names(), matrix.FAMILIES):
        if reason := matrix.absent(method, family):
            found.setdefault(reason, {}).setdefault(method, []).append(family)
    return found


def _row(method: str, family: str, signs: Mapping[Cell, str]) -> dict[str, Any]:
    def word(kernel: str, dtype: str) -> str:
        cells = (Cell(family, kernel, dtype, method, e) for e in matrix.EQUALITIES)
        return "".join(signs.get(cell, NO_CELL) for cell in cells)

    outcomes = [" ".join(word(k, d) for d in matrix.DTYPES) for k in matrix.KERNELS]
    return {"fingerprint": fingerprint.of_pair(method, family), "outcomes": outcomes}


def dumps(content: Mapping[str, Any]) -> str:
    """The file's text: one line per entry, one per pair of method and family."""
    lines = []
    for name, value in content.items():
        if name == "results":
            value = ",\n".join(f"  {json.dumps(m)}: {_block(rows)}" for m, rows in value.items())
            lines.append(f' "results": {{\n{value}\n }}')
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _block(rows: Mapping[str, Any]) -> str:
    inside = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f"{{\n{inside}\n  }}"
