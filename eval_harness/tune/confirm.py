"""The test of the finalists, on samples and timings that the search has not seen.

All finalists share the probability `alpha` of a wrong choice: their p values are adjusted by Holm's
method, so that the probability that any pipeline is certified which is not admissible, and with it
the probability that the chosen one is not, is `alpha` at most, however they depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eval_harness import pairs
from eval_harness.tune import evidence
from eval_harness.tune.budget import OutOfTime
from eval_harness.tune.goal import Goal
from eval_harness.tune.halving import Search
from eval_harness.tune.judge import HELD_OUT, SEARCH

_LOOKS = 4  # at the held-out samples; each may be the last


@dataclass(frozen=True)
class Chosen:
    """A pipeline that is admissible, but for a probability of `alpha`.

    Attributes:
        pipeline: its spec.
        p: of "it is not admissible", adjusted for all tests.
        kept: share of the full model's score that it kept on the held-out samples; None if none
            were asked.
        kept_at_least: lower bound of that share, at the level of all bounds together.
    """

    pipeline: str
    p: float
    kept: float | None
    kept_at_least: float


@dataclass(frozen=True)
class NoneAdmissible:
    """No pipeline could be certified.

    Attributes:
        why: in a sentence.
        reachable: the floor (or ceiling) that could have been certified on the same samples; None
            where there is none.
        pipeline: that reaches it.
        images_needed: held-out images that certify a pipeline which answers as the full model;
            None under a ceiling.
    """

    why: str
    reachable: float | None
    pipeline: str | None
    images_needed: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What the test came to.

    Attributes:
        outcome: a choice, or why there is none.
        finalists: JSON-ready, one row each.
        tests: that share `alpha`, those of earlier runs on the same samples included.
    """

    outcome: Chosen | NoneAdmissible
    finalists: list[dict[str, Any]]
    tests: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        status = "chosen" if isinstance(self.outcome, Chosen) else "none"
        return {
            "status": status,
            **asdict(self.outcome),
            "finalists": self.finalists,
            "tests": self.tests,
        }


def of_floor(search: Search, finalists: Sequence[str], goal: Goal, tests: int) -> Verdict:
    """The cheapest finalist that keeps the floor.

    Args:
        search: when it is over.
        finalists: cheapest first.
        goal: a floor.
        tests: that share `alpha`, at least as many as finalists.
    """
    floor, widest = goal.keep_accuracy or 0.0, search.judge.widest
    bets = {spec: evidence.Bets.after(_stakes(search, spec, SEARCH, floor)) for spec in finalists}
    adjusted = dict.fromkeys(finalists, 1.0)
    left = list(finalists)
    size = search.judge.sizes[HELD_OUT]
    ends = sorted({math.ceil(size * look / _LOOKS) for look in range(1, _LOOKS + 1)})
    try:
        for look in range(len(ends)):
            if not left:
                break
            _ask(search, left, ends[: look + 1])
            ps = [bets[s].p(_stakes(search, s, HELD_OUT, floor)) for s in finalists]
            held = pairs.holm([*ps, *[1.0] * (tests - len(ps))])
            adjusted = dict(zip(finalists, held, strict=False))
            search.decide(None, "tested", images=ends[look], p=dict(adjusted))
            sure = next((s for s in finalists if adjusted[s] <= goal.alpha), None)
            # Dearer ones no longer matter.
            left = list(finalists[: finalists.index(sure)] if sure else finalists)
    except OutOfTime as error:
        search.decide(None, "test ends", why=str(error))
    rows = [_row(search, s, adjusted[s], goal.alpha / tests) for s in finalists]
    sure_rows = [row for row in rows if row["p"] <= goal.alpha]
    if sure_rows:
        return Verdict(_chosen(sure_rows[0]), rows, tests)
    best = max(rows, key=lambda row: row["kept_at_least"], default=None)
    outcome = NoneAdmissible(
        f"no pipeline could be shown to keep {100 * floor:g} % of the full model's score",
        best["kept_at_least"] or None if best else None,
        best["pipeline"] if best and best["kept_at_least"] else None,
        _needed(search, floor, widest, goal.alpha / max(1, tests)),
    )
    return Verdict(outcome, rows, tests)


def under_ceiling(search: Search, finalists: Sequence[str], goal: Goal, tests: int) -> Verdict:
    """The most accurate finalist that stays below the ceiling.

    Args:
        search: when it is over.
        finalists: most accurate first.
        goal: a ceiling.
        tests: that share `alpha`, at least as many as finalists.
    """
    ceiling = goal.ceiling or 0.0
    fresh = search.judge.again(finalists)
    timed = [spec for spec in finalists if spec in fresh]
    ps = [_p_below(fresh[spec], ceiling) for spec in timed]
    held = pairs.holm([*ps, *[1.0] * (tests - len(ps))])
    adjusted = {**dict.fromkeys(finalists, 1.0), **dict(zip(timed, held, strict=False))}
    search.decide(None, "tested", p=adjusted)
    sure = [spec for spec in finalists if adjusted[spec] <= goal.alpha]
    try:
        if sure:
            _ask(search, sure, [search.judge.sizes[HELD_OUT]])
    except OutOfTime as error:
        search.decide(None, "test ends", why=str(error))
    rows = [_row(search, s, adjusted[s], goal.alpha / tests) for s in finalists]
    certified = [row for row in rows if row["pipeline"] in sure]
    if certified:
        # Where time did not allow to ask all of them, the order of the search decides.
        told = [row for row in certified if row["kept"] is not None]
        whole = len(told) == len(certified)
        best = max(told, key=lambda row: row["kept"]) if whole else certified[0]
        return Verdict(_chosen(best), rows, tests)
    near = {spec: _reached(fresh[spec], goal.alpha / tests) for spec in timed}
    reached = {spec: value for spec, value in near.items() if value is not None}
    spec = min(reached, key=reached.__getitem__, default=None)
    why = f"no pipeline could be shown to cost {goal}"
    return Verdict(NoneAdmissible(why, reached[spec] if spec else None, spec), rows, tests)


def _ask(search: Search, specs: Sequence[str], ends: Sequence[int]) -> None:
    """Ask the held-out samples: the full model first, with which the others are compared."""
    for spec in (None, *specs):
        search.reach(spec, HELD_OUT, ends)


def _stakes(search: Search, spec: str, part: str, floor: float) -> Any:
    paired = search.paired(spec, part)
    return [] if paired is None else paired.stakes(floor, search.judge.widest)


def _row(search: Search, spec: str, p: float, level: float) -> dict[str, Any]:
    searched, tested = search.paired(spec, SEARCH), search.paired(spec, HELD_OUT)
    low = 0.0
    if searched is not None and tested is not None:
        low = evidence.share_kept(searched, tested, search.judge.widest, level)
    return {
        "pipeline": spec,
        "cost": search.costs[spec].share,
        "p": p,
        "kept": None if tested is None else tested.kept,
        "kept_at_least": low,
        "kept_in_search": None if searched is None else searched.kept,
        "images": 0 if tested is None else len(tested.counts),
        "difference": _difference(search, spec),
    }


def _difference(search: Search, spec: str) -> dict[str, float] | None:
    """Score minus the full model's on the held-out samples, with a 95 % interval by image."""
    one, full = search.known(spec, HELD_OUT), search.known(None, HELD_OUT)
    if one is None or full is None:
        return None
    n = min(len(one), len(full))
    difference = one.values[:n] - full.values[:n]
    return pairs.mean_by_image(difference, full.images[:n], seed=search.rules.seed).to_dict()


def _chosen(row: dict[str, Any]) -> Chosen:
    return Chosen(row["pipeline"], row["p"], row["kept"], row["kept_at_least"])


def _needed(search: Search, floor: float, widest: int, level: float) -> int | None:
    full = search.known(None, SEARCH)
    if full is None or not len(full):
        return None
    return evidence.images_needed(evidence.Paired.of(full, full).full, floor, widest, level)


def _p_below(values: Sequence[float], ceiling: float) -> float:
    if len(values) == 1:  # counted, not measured
        return float(values[0] > ceiling)
    return evidence.below(list(values), ceiling)


def _reached(values: Sequence[float], level: float) -> float | None:
    """The lowest ceiling that these measurements would certify."""
    found = (value for value in sorted(values) if _p_below(values, value) <= level)
    return next(found, None)
