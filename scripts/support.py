"""Writes docs/support.md from the outcomes that `make support` collected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
CPU = ROOT / "docs" / "assets" / "support.json"
GPU = ROOT / "docs" / "assets" / "support_gpu.json"

HEAD = (
    "# What a patched model works with",
    "",
    "One row per integration, made from the outcomes of the tests in `tests/support` by "
    "`make support`; a test fails when a row is missing or too old.",
    "All of them run on tiny random models of the families named, which have the architecture of "
    "the released ones; rows without a family run on the reference model.",
    "What is in no row is not tested.",
    "",
    "- **tested in CI**: the claim holds on a CPU for every family named, in each run of "
    "`make test`.",
    "- **tested on GPU**: it held on a CUDA device; the results file says on which, and under "
    "which versions.",
    "- **refused**: the library raises an error that names the remedy, and a test holds that it "
    "does.",
    "- **does not work**: a test shows it, and why.",
    "- **not tested**: the test exists and was skipped, and why.",
    "",
)


def page() -> str:
    """The whole page."""
    results = read(CPU)
    gpu = read(GPU) if GPU.exists() else None
    measured = {row["feature"]: row for row in gpu["rows"]} if gpu else {}
    lines = [
        *HEAD,
        "| integration | outcome | families | what the test asserts |",
        "|---|---|---|---|",
    ]
    for row in results["rows"]:
        row = measured.get(row["feature"], row) if row["gpu"] else row
        lines.append(f"| {row['feature']} | {outcome(row)} | {families(row)} | {claims(row)} |")
    lines += ["", _source("assets/support.json", results["environment"])]
    if gpu:
        lines.append(_source("assets/support_gpu.json", gpu["environment"]))
    return "\n".join(lines) + "\n"


def outcome(row: dict[str, Any]) -> str:
    """How a row stands, and why where something is missing."""
    reasons = dict.fromkeys(reason for reason in row["except"].values() if reason)
    why = f": {'; '.join(reasons)}" if reasons else ""
    if row["outcome"] == "tested":
        where = "GPU ([results](assets/support_gpu.json))" if row["gpu"] else "CI"
        missing = ", ".join(f"`{family}`" for family in row["except"] if family)
        return (
            f"tested on {where}" * row["gpu"]
            + f"tested in {where}" * (not row["gpu"])
            + (f"; not {missing}{why}" if missing else "")
        )
    if row["outcome"] == "refused":
        return "refused with an error"
    return f"{row['outcome']}{why}"


def families(row: dict[str, Any]) -> str:
    """The families that a row was tested on, or is to be."""
    names = row["families"] or row["except"]
    return ", ".join(f"`{name}`" for name in names if name)


def claims(row: dict[str, Any]) -> str:
    """What its tests assert."""
    return "; ".join(row["claims"])


def read(path: Path) -> dict[str, Any]:
    """A results file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _source(path: str, environment: dict[str, Any]) -> str:
    where = dict(environment)
    commit, device = where.pop("commit") or "unknown", where.pop("device")
    versions = ", ".join(f"{name} {number}" for name, number in where.items())
    return f"From [{path}]({path}) (`make support`): commit {commit}, {device}, {versions}."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
