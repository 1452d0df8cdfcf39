"""The pytest plugin of `make test-matrix`: shards, resuming, and outcomes written as they come."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import fingerprint, results
from tests.matrix.cells import Cell, in_shard, parse_shard

PASSED = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of a matrix run."""
    group = parser.getgroup("matrix")
    group.addoption("--shard", default="1/1", help="the part of the matrix to run, as 1/4")
    group.addoption("--fresh", action="store_true", help="run what has passed already, too")
    group.addoption("--new", action="store_true", help="leave out what passed on earlier sources")
    group.addoption("--results", default=str(results.FOLDER), help="where outcomes are appended")


def pytest_configure(config: pytest.Config) -> None:
    """Find out what has passed; workers are told, so that all of them collect the same cells."""
    if hasattr(config, "workerinput"):
        config.stash[PASSED] = set(config.workerinput["passed"])
        return
    try:
        parse_shard(config.getoption("--shard"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    folder = Path(config.getoption("--results"))
    if config.getoption("--fresh"):
        for file in folder.glob("*.jsonl"):
            file.unlink()
        config.stash[PASSED] = set()
    else:
        config.stash[PASSED] = results.passed(results.merged(folder))
    if config.getoption("--new"):
        config.stash[PASSED] |= results.passed_earlier()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist: what the controller knows goes to a worker, also to one that replaces another."""
    node.workerinput["passed"] = sorted(node.config.stash[PASSED])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cells of other shards and cells that passed."""
    shard, passed = parse_shard(config.getoption("--shard")), config.stash[PASSED]
    chosen, left_out = [], []
    for item in items:
        cell = cell_of(item)
        wanted = cell is None or (in_shard(cell, shard) and str(cell) not in passed)
        (chosen if wanted else left_out).append(item)
        if cell is not None:
            # Now, when the library has just been imported: its files may change while cells run.
            fingerprint.of_pair(cell.method, cell.family)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write the outcome of a cell; this runs in the process that ran the cell."""
    report = yield
    cell = cell_of(item)
    if cell is not None and (report.when == "call" or report.failed):
        folder = Path(item.config.getoption("--results"))
        workerinput = getattr(item.config, "workerinput", {"workerid": "main"})
        results.append(folder, workerinput["workerid"], outcome_of(cell, report, call))
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that finds everything passed already is a success."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def outcome_of(
    cell: Cell, report: pytest.TestReport, call: pytest.CallInfo[None]
) -> results.Outcome:
    """A report in the words of the results."""
    what = str(call.excinfo.value) if call.excinfo is not None else ""
    return results.Outcome(
        cell=str(cell),
        fingerprint=fingerprint.of_pair(cell.method, cell.family),
        outcome=report.outcome,
        reason=what.partition("\n")[0],
        seconds=round(report.duration, 2),
    )


def cell_of(item: pytest.Item) -> Cell | None:
    """The cell that a test runs; None for other tests."""
    callspec = getattr(item, "callspec", None)
    cell = None if callspec is None else callspec.params.get("cell")
    return cell if isinstance(cell, Cell) else None
