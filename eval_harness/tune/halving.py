"""Successive halving: few images for many pipelines, more for those that are still in question.

Each rung has twice the images of the one before. Towards a floor, pipelines are asked in the order
of their cost: the walk drops those whose interval lies below the floor and ends as soon as enough
cheaper ones look admissible; dearer ones wait, and get their turn when those before them fall.
Under a ceiling, the more accurate half of a rung goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from eval_harness.statistics import Estimate
from eval_harness.tune import evidence
from eval_harness.tune.budget import OutOfTime
from eval_harness.tune.judge import SEARCH, Cost, Judge, Scores

Decision: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """How the search goes.

    Attributes:
        first: images of the first rung.
        factor: by which rungs grow, and fewer pipelines go on.
        finalists: pipelines that are tested in the end, at most.
        confidence: level of the intervals that drop pipelines.
        seed: of resampling.
    """

    first: int = 16
    factor: int = 2
    finalists: int = 4
    confidence: float = 0.95
    seed: int = 0

    def rungs(self, images: int) -> list[int]:
        """Images up to the end of each rung."""
        ends = [min(self.first, images)]
        while ends[-1] < images:
            ends.append(min(ends[-1] * self.factor, images))
        return ends

    def width(self, candidates: int, rung: int) -> int:
        """Pipelines that are enough after a rung."""
        return max(self.finalists, math.ceil(candidates / self.factor ** (rung + 1)))


@dataclass
class Search:
    """What is known of every pipeline, and every decision that was taken.

    Attributes:
        judge: answers.
        costs: of the pipelines, in rising order.
        rules: of the search.
        decisions: in their order.
        say: called with each decision.
        asked: questions, repeated ones not counted.
    """

    judge: Judge
    costs: Mapping[str, Cost]
    rules: Rules
    say: Callable[[Decision], None] = lambda decision: None
    decisions: list[Decision] = field(default_factory=list)
    asked: int = 0
    _seen: dict[tuple[str, str | None], list[Scores]] = field(default_factory=dict)

    def decide(self, spec: str | None, decision: str, **facts: Any) -> None:
        """Write down what is decided, and why."""
        row = {"pipeline": spec, "decision": decision, **facts}
        self.decisions.append(row)
        self.say(row)

    def reach(self, spec: str | None, part: str, ends: Sequence[int]) -> Scores:
        """Scores of a part's images up to the last of `ends`, asked range by range."""
        seen = self._seen.setdefault((part, spec), [])
        for place in range(len(seen), len(ends)):
            first = ends[place - 1] if place else 0
            seen.append(self.judge.scores(spec, part, first, ends[place]))
            self.asked += len(seen[-1])
        return Scores.together(seen[: len(ends)])

    def known(self, spec: str | None, part: str) -> Scores | None:
        """What was asked so far; None if nothing."""
        seen = self._seen.get((part, spec))
        return Scores.together(seen) if seen else None

    def paired(self, spec: str, part: str) -> evidence.Paired | None:
        """A pipeline beside the full model on the questions that both were asked."""
        one, full = self.known(spec, part), self.known(None, part)
        if one is None or full is None:
            return None
        n = min(len(one), len(full))
        cut = [Scores(s.values[:n], s.images[:n]) for s in (one, full)]
        return evidence.Paired.of(*cut)

    def test_of(self, spec: str) -> str:
        """Name of a pipeline's test: another one where the search has seen more, or less, of it."""
        seen = self.known(spec, SEARCH)
        return f"{spec} after {0 if seen is None else len(seen)} questions"


def towards_floor(search: Search, floor: float) -> list[str]:
    """The pipelines that may keep the floor, cheapest first.

    Args:
        search: with costs; those of 1 or more save nothing and are dropped.
        floor: share of the full model's score.
    """
    rules, alive = search.rules, []
    for spec, cost in search.costs.items():
        if cost.share < 1:
            alive.append(spec)
        else:
            search.decide(spec, "dropped", why="it costs no less than the full model")
    candidates, rungs = len(alive), rules.rungs(search.judge.sizes[SEARCH])
    try:
        for rung in range(len(rungs)):
            _walk(search, alive, floor, rungs[: rung + 1], rules.width(candidates, rung))
    except OutOfTime as error:
        search.decide(None, "search ends", why=str(error))
    return [spec for spec in alive if search.known(spec, SEARCH) is not None]


def _walk(search: Search, alive: list[str], floor: float, ends: Sequence[int], wanted: int) -> None:
    """One rung: from the cheapest pipeline up, until so many look admissible."""
    full = search.reach(None, SEARCH, ends)
    queue, found = list(alive), 0
    while queue and found < wanted:
        block, queue = queue[: wanted - found], queue[wanted - found :]
        asked = [search.reach(spec, SEARCH, ends) for spec in block]
        rows = [scores.values - floor * full.values for scores in asked]
        told = _estimates(search, rows, full)
        for spec, estimate in zip(block, told, strict=True):
            facts = {"images": ends[-1], "margin": estimate.to_dict()}
            if estimate.high < 0:
                alive.remove(spec)
                search.decide(spec, "dropped", why="its interval is below the floor", **facts)
            else:
                found += estimate.mean >= 0
                search.decide(spec, "goes on", **facts)
    if queue:
        search.decide(
            None, "wait", images=ends[-1], pipelines=len(queue), why=f"{found} cheaper look fine"
        )


def under_ceiling(search: Search, ceiling: float) -> list[str]:
    """The most accurate pipelines among those that are cheap enough, best first.

    Args:
        search: with costs; those above the ceiling are dropped.
        ceiling: in the unit of `Cost.value`.
    """
    rules, alive = search.rules, []
    for spec, cost in search.costs.items():
        if cost.value <= ceiling:
            alive.append(spec)
        else:
            search.decide(spec, "dropped", why="it costs more than the ceiling", cost=cost.value)
    candidates, rungs = len(alive), rules.rungs(search.judge.sizes[SEARCH])
    try:
        for rung in range(len(rungs)):
            if alive:
                alive = _half(search, alive, rungs[: rung + 1], rules.width(candidates, rung))
    except OutOfTime as error:
        search.decide(None, "search ends", why=str(error))
    return alive[: rules.finalists]


def _half(search: Search, alive: list[str], ends: Sequence[int], wanted: int) -> list[str]:
    """One rung: the pipelines that go on, best first."""
    full = search.reach(None, SEARCH, ends)
    asked = {spec: search.reach(spec, SEARCH, ends) for spec in alive}
    order = sorted(alive, key=lambda spec: (-asked[spec].values.mean(), search.costs[spec].share))
    rows = [asked[spec].values - asked[order[0]].values for spec in order]
    stay: list[str] = []
    for spec, estimate in zip(order, _estimates(search, rows, full), strict=True):
        facts = {"images": ends[-1], "behind_best": estimate.to_dict()}
        if estimate.high < 0:
            search.decide(spec, "dropped", why="its interval is below the best", **facts)
        elif len(stay) >= wanted:
            search.decide(spec, "dropped", why=f"{wanted} are more accurate", **facts)
        else:
            stay.append(spec)
            search.decide(spec, "goes on", **facts)
    return stay


def _estimates(search: Search, rows: list[Any], full: Scores) -> list[Estimate]:
    rules = search.rules
    return evidence.estimates(rows, full.images, confidence=rules.confidence, seed=rules.seed)
