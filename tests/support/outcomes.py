"""Outcomes of marked tests, joined to one row per integration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from eval_harness import machine

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")


class Marked(NamedTuple):
    """A test with a `support` marker.

    Attributes:
        feature: what stands in its marker.
        claim: the first line of its docstring: what it asserts.
        family: the family it runs on; empty for the reference model.
        refuses: whether it asserts that the library refuses the feature.
        gpu: whether it needs a CUDA device.
        file: the file it stands in.
    """

    feature: str
    claim: str
    family: str
    refuses: bool
    gpu: bool
    file: str


class Result(NamedTuple):
    """How a marked test ended: passed, xfailed, skipped or failed, and for the two between why."""

    test: Marked
    outcome: str
    reason: str = ""


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One JSON-ready row per feature, in the order of the files and the tests in them."""
    ordered = sorted(results, key=lambda result: result.test.file)
    features = dict.fromkeys(result.test.feature for result in ordered)
    return [_row([r for r in ordered if r.test.feature == feature]) for feature in features]


def _row(results: Sequence[Result]) -> dict[str, Any]:
    first = results[0].test
    held = [r.test.family for r in results if r.outcome == "passed"]
    rest = {r.test.family: r.reason for r in results if r.outcome != "passed"}
    return {
        "feature": first.feature,
        "outcome": _joined(results),
        "gpu": first.gpu,
        "families": sorted(set(held) - set(rest)),
        "except": rest,
        "claims": list(dict.fromkeys(result.test.claim for result in results)),
    }


def _joined(results: Sequence[Result]) -> str:
    found = {result.outcome for result in results}
    if "failed" in found:
        return "failed"
    if "passed" in found:
        return "refused" if results[0].test.refuses else "tested"
    return "does not work" if "xfailed" in found else "not tested"


def families_by_feature(tests: Sequence[Marked]) -> dict[str, list[str]]:
    """Which families each feature is asked of."""
    return {
        feature: sorted({test.family for test in tests if test.feature == feature})
        for feature in dict.fromkeys(test.feature for test in tests)
    }


def environment() -> dict[str, Any]:
    """Commit, device and versions."""
    return {
        "commit": machine.commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
