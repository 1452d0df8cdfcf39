"""Collects the outcomes of tests marked `support` and writes them where `--support-out` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import outcomes
from tests.support.outcomes import Marked, Result

COLLECTED = pytest.StashKey[list[Marked]]()
HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-out", type=Path, help="write outcomes as JSON to this file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--support-out", default=None)
    is_worker = hasattr(config, "workerinput")  # its reports go to the process that started it
    if path is not None and not is_worker:
        config.pluginmanager.register(Writer(path))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked, noted before `-m` takes tests away, and told to each report."""
    marked = {item: _marked(item) for item in items if item.get_closest_marker("support")}
    config.stash[COLLECTED] = list(marked.values())
    for item, told in marked.items():
        item.user_properties.append(("support", told._asdict()))


def _marked(item: Any) -> Marked:
    marker = item.get_closest_marker("support")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return Marked(
        feature=marker.args[0],
        claim=(item.function.__doc__ or "").partition("\n")[0].rstrip("."),
        family=parameters.get("family", ""),
        refuses=marker.kwargs.get("refuses", False),
        gpu=item.get_closest_marker("gpu") is not None,
        file=item.path.name,
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def collected(request: pytest.FixtureRequest) -> list[Marked]:
    """Every marked test; only known where the whole folder was collected."""
    marked = request.config.stash[COLLECTED]
    missing = {path.name for path in HERE.glob("test_*.py")} - {m.file for m in marked}
    if missing - {"test_table.py"}:
        pytest.skip("runs when all of tests/support is collected")
    return marked


class Writer:
    """Gathers reports and writes them when all went well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: list[Result] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties).get("support")
        if told is None or (report.when != "call" and report.outcome == "passed"):
            return
        xfailed = hasattr(report, "wasxfail") and report.outcome == "skipped"
        outcome = "xfailed" if xfailed else report.outcome
        self._results.append(Result(Marked(**told), outcome, _reason(report)))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == 0:
            found = {"environment": outcomes.environment(), "rows": outcomes.rows(self._results)}
            self._path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return report.wasxfail.removeprefix("reason: ")
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return ""
