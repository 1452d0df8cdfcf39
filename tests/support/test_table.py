"""The support table is as old as the tests it is made from."""

from __future__ import annotations

import pytest

from scripts import support as script
from tests.support import outcomes
from tests.support.outcomes import Marked, Result


def test_the_results_have_the_rows_and_families_of_the_tests(collected):
    rows = script.read(script.CPU)["rows"]
    described = {row["feature"]: sorted({*row["families"], *row["except"]} or {""}) for row in rows}
    assert described == outcomes.families_by_feature(collected), "run `make support`"


def test_the_results_say_what_the_tests_say(collected):
    rows = script.read(script.CPU)["rows"]
    claims = {row["feature"]: set(row["claims"]) for row in rows}
    for test in collected:
        assert test.claim, f"the test of {test.feature!r} needs a docstring"
        assert test.claim in claims[test.feature], "run `make support`"


def test_no_row_failed():
    for path in (script.CPU, script.GPU):
        rows = script.read(path)["rows"] if path.exists() else []
        assert not [row["feature"] for row in rows if row["outcome"] == "failed"]


def test_the_page_is_made_from_the_results():
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run `make support`"


def result(outcome, family="llava", reason="", **marked):
    test = Marked(
        "beams", "It holds", family, **{"refuses": False, "gpu": False, **marked}, file=""
    )
    return Result(test, outcome, reason)


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([result("passed")], "tested in CI"),
        ([result("passed", gpu=True)], "tested on GPU ([results](assets/support_gpu.json))"),
        ([result("passed", refuses=True)], "refused with an error"),
        ([result("skipped", reason="no device")], "not tested: no device"),
        ([result("xfailed", reason="upstream")], "does not work: upstream"),
        (
            [result("passed"), result("xfailed", "ovis2", "upstream")],
            "tested in CI; not `ovis2`: upstream",
        ),
        ([result("passed"), result("failed")], "failed"),
    ],
)
def test_outcomes_become_words(results, said):
    (row,) = outcomes.rows(results)
    assert script.outcome(row) == said
