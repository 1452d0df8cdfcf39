"""The search on drawn answers: what it finds, how sure it is, and what it asks for that."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from eval_harness.tune import evidence
from eval_harness.tune.budget import Budget, OutOfTime, seconds_of
from eval_harness.tune.confirm import Chosen, NoneAdmissible
from eval_harness.tune.evidence import Bets, Paired
from eval_harness.tune.goal import Goal, ceiling_of
from eval_harness.tune.halving import Rules
from eval_harness.tune.judge import Scores
from eval_harness.tune.run import choose
from tests.harness.surface import FULL_ACCURACY, Known, Surface, grid
from vlmcompress.core.errors import ConfigError

ALPHA = 0.1
SEEDS = 30
SPACE = grid((0.5, 1, 2, 4, 6), (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 0.9))


def _most(n: int, rate: float = ALPHA) -> int:
    """Failures that a rate of `rate` exceeds once in a thousand times."""
    return int(binom.ppf(0.999, n, rate))


def _run(known, goal, *, seed=0, budget=None, judge=None, **sizes):
    judge = judge or Surface(known, seed=seed, **sizes)
    search, verdict = choose(judge, [*known], goal, Rules(seed=seed), budget or Budget())
    return judge, search, verdict


@pytest.mark.slow
def test_the_cheapest_admissible_pipeline_is_found_at_the_stated_confidence():
    floor, found, asked, wrong = 0.9, Counter(), [], 0
    admissible = [spec for spec, one in SPACE.items() if one.kept >= floor]
    clear = [s for s in admissible if SPACE[s].kept >= floor + 0.05]
    best, sure = (min(SPACE[s].cost for s in group) for group in (admissible, clear))
    for seed in range(SEEDS):
        judge, _, verdict = _run(SPACE, Goal(keep_accuracy=floor, alpha=ALPHA), seed=seed)
        assert isinstance(verdict.outcome, Chosen)
        chosen = SPACE[verdict.outcome.pipeline]
        wrong += chosen.kept < floor
        found["best" if chosen.cost <= sure else "dearer"] += 1
        assert chosen.cost <= 2 * best
        asked.append(judge.asked / ((1 + len(SPACE)) * judge.questions))
    assert wrong <= _most(SEEDS)
    # As cheap as the cheapest that is admissible by a margin which so few samples can show.
    assert found["best"] >= 0.7 * SEEDS
    assert np.mean(asked) < 0.3


@pytest.mark.slow
def test_pipelines_just_below_the_floor_are_hardly_ever_chosen():
    known = {f"m{i}": Known(0.3 + 0.05 * i, 0.9 - 1e-9) for i in range(8)}
    outcomes = [
        _run(known, Goal(keep_accuracy=0.9, alpha=ALPHA), seed=seed, search=48, held_out=96)[2]
        for seed in range(SEEDS)
    ]
    assert sum(isinstance(v.outcome, Chosen) for v in outcomes) <= _most(SEEDS)


def test_bets_hold_their_level_at_every_moment():
    draw, floor, n, wrong, bounds = np.random.default_rng(0), 0.9, 120, 0, 0
    for turn in range(200):
        full = (draw.random((2, n)) < FULL_ACCURACY).astype(float)
        same = draw.random((2, n)) < floor  # loses, never gains: exactly at the floor
        searched, tested = (Paired(f * s, f, np.ones(n)) for f, s in zip(full, same, strict=True))
        wrong += Bets.after(searched.stakes(floor, 1)).p(tested.stakes(floor, 1)) <= ALPHA
        if turn % 4 == 0:  # takes longer: every floor below is tried
            bounds += evidence.share_kept(searched, tested, 1, ALPHA) > floor
    assert wrong <= _most(200)
    assert bounds <= _most(50)


def test_no_difference_at_all_is_no_proof():
    same = Paired(np.ones(20), np.ones(20), np.ones(20))
    bets = Bets.after(same.stakes(0.99, 1))
    assert bets.p(same.stakes(0.99, 1)) > 0.5
    needed = evidence.images_needed(np.ones(20), 0.99, 1, 0.05)
    assert 300 < needed < 600
    enough = Paired(*[np.ones(needed)] * 3)
    assert Bets.after(enough.stakes(0.99, 1)).p(enough.stakes(0.99, 1)) <= 0.05
    assert evidence.share_kept(enough, enough, 1, 0.05) == pytest.approx(0.99)


def test_questions_of_an_image_count_together():
    images = np.repeat(np.arange(4), 3)
    full, short = np.ones(12), np.array([1.0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    paired = Paired.of(Scores(short, images), Scores(full, images))
    assert paired.scores.tolist() == [3, 0, 3, 3]
    assert paired.kept == 0.75
    assert paired.stakes(0.5, 3).tolist() == pytest.approx([1, -1, 1, 1])


def test_under_a_ceiling_the_most_accurate_is_taken():
    goal, wrong, accurate = Goal(max_cost=0.5, alpha=ALPHA), 0, []
    for seed in range(8):
        *_, verdict = _run(SPACE, goal, seed=seed, search=128, held_out=64)
        assert isinstance(verdict.outcome, Chosen)
        one = SPACE[verdict.outcome.pipeline]
        wrong += one.cost > 0.5
        accurate.append(one.kept)
        assert 0 < verdict.outcome.kept_at_least <= verdict.outcome.kept
    assert wrong <= _most(8)
    best = max(one.kept for one in SPACE.values() if one.cost <= 0.5)
    assert min(accurate) > best - 0.04


def test_a_ceiling_that_timings_do_not_prove():
    known = {"m0": Known(0.5, 1.0)}
    _, _, verdict = _run(known, Goal(max_cost=0.5), search=16, held_out=16)
    assert isinstance(verdict.outcome, NoneAdmissible)
    assert 0.5 < verdict.outcome.reachable < 0.55
    _, search, verdict = _run(known, Goal(max_cost=0.3), search=16, held_out=16)
    assert verdict.outcome == NoneAdmissible(
        "no pipeline could be shown to cost at most 30 % of the full model's cost", None, None
    )
    assert search.asked == 0


def test_no_admissible_pipeline_says_which_floor_can_be_reached():
    known = {"m0": Known(0.2, 0.5), "m1": Known(0.4, 0.8)}
    _, search, verdict = _run(known, Goal(keep_accuracy=0.97))
    assert isinstance(verdict.outcome, NoneAdmissible)
    assert verdict.outcome.pipeline == "m1"
    assert 0.65 < verdict.outcome.reachable <= 0.82
    assert 100 < verdict.outcome.images_needed < 400
    # Both were dropped, and tested nevertheless: to say what can be reached.
    for name in known:
        assert "dropped" in {d["decision"] for d in search.decisions if d["pipeline"] == name}


def test_too_few_samples_say_how_many_are_needed():
    known = {"m0": Known(0.2, 1.0, noise=0.0)}
    _, _, verdict = _run(known, Goal(keep_accuracy=0.99), search=32, held_out=32)
    assert isinstance(verdict.outcome, NoneAdmissible)
    assert verdict.outcome.images_needed > 300
    assert 0.8 < verdict.outcome.reachable < 0.99


def test_what_saves_nothing_is_not_asked():
    known = {"slow": Known(1.1, 1.0), "fast": Known(0.3, 1.0)}
    _, search, verdict = _run(known, Goal(keep_accuracy=0.8))
    assert verdict.outcome.pipeline == "fast"
    first = search.decisions[0]
    assert (first["pipeline"], first["decision"]) == ("slow", "dropped")
    assert "no less than the full model" in first["why"]


def test_earlier_tests_on_the_same_samples_count():
    known = {"m0": Known(0.3, 0.97)}
    judge, goal = Surface(known), Goal(keep_accuracy=0.9)
    _, alone = choose(judge, ["m0"], goal, Rules(), Budget())
    before = [f"other {i}" for i in range(9)]
    _, later = choose(judge, ["m0"], goal, Rules(), Budget(), lambda tests: [*before, *tests])
    assert (alone.tests, later.tests) == (1, 10)
    assert later.finalists[0]["kept_at_least"] < alone.finalists[0]["kept_at_least"]


class _Slow(Surface):
    """An image takes a second."""

    def over(self, budget: Budget, clock: list[float]) -> _Slow:
        self.budget, self.clock = budget, clock
        return self

    def scores(self, spec, part, first, last):
        with self.budget.step("ask", last - first):
            self.clock[0] += last - first
            return super().scores(spec, part, first, last)


@pytest.mark.parametrize("seconds", [60.0, 400.0, 6000.0])
def test_the_budget_holds(seconds):
    clock = [0.0]
    budget = Budget(seconds, lambda: clock[0])
    judge = _Slow(SPACE, search=64, held_out=64).over(budget, clock)
    _, search, verdict = _run(SPACE, Goal(keep_accuracy=0.8), budget=budget, judge=judge)
    assert clock[0] <= seconds
    ends = [d for d in search.decisions if d["decision"] in ("search ends", "test ends")]
    assert all("s are spent" in d["why"] for d in ends)
    assert bool(ends) == (seconds < 6000)
    assert verdict.finalists


def test_budgets_and_goals_as_they_are_written():
    assert [seconds_of(text) for text in ("90", "90s", "1.5m", "2h")] == [90, 90, 90, 7200]
    assert ceiling_of("0.6") == {"max_cost": 0.6}
    assert ceiling_of("150ms") == {"max_seconds": pytest.approx(0.15)}
    for wrong in ("", "soon", "-3m"):
        with pytest.raises(ConfigError, match="30m"):
            seconds_of(wrong)
    for wrong in ("fast", "1.2.3", "3h"):
        with pytest.raises(ConfigError, match="150ms"):
            ceiling_of(wrong)
    for given in ({}, {"keep_accuracy": 0.9, "max_cost": 0.5}, {"keep_accuracy": 1.0}):
        with pytest.raises(ConfigError):
            Goal(**given)
    with pytest.raises(ConfigError, match="alpha"):
        Goal(keep_accuracy=0.9, alpha=0.0)
    with pytest.raises(OutOfTime), Budget(1.0, iter([0.0, 2.0, 2.0]).__next__).step("x", 1):
        raise AssertionError("there was time")


def test_the_page_tells_how_many_images_floors_need():
    page = (Path(__file__).resolve().parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (0\.\d+) \| (\d+) \|$", page, flags=re.MULTILINE)
    assert len(rows) > 3
    for floor, needed in rows:
        assert int(needed) == evidence.images_needed(np.ones(1), float(floor), 1, 0.05)
