"""Which pipelines are worth a test on samples that nobody has seen.

Each pipeline that is tested makes the test of all others harder (Holm), so that only those are
tested which lower the cost that can be expected of what is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eval_harness.tune.evidence import Bets
from eval_harness.tune.halving import Search
from eval_harness.tune.judge import HELD_OUT, SEARCH

_GAIN = 1e-3  # of the full model's cost, that one more test must promise


def worth_testing(
    search: Search, specs: Sequence[str], floor: float, alpha: float, tested: Sequence[str] = ()
) -> list[str]:
    """The finalists, cheapest first; none where no test has a chance.

    Args:
        search: when it is over.
        specs: pipelines that may keep the floor, cheapest first.
        floor: share of the full model's score.
        alpha: of all tests together.
        tested: tests on the same samples before (`Search.test_of`), which count as well.
    """
    chosen: list[str] = []
    least = 1.0
    powers: dict[tuple[str, int], float] = {}

    def expected(names: Sequence[str]) -> float:
        tests = len({*map(search.test_of, names), *tested})
        for name in names:
            if (name, tests) not in powers:
                powers[name, tests] = chance(search, name, floor, alpha / tests)
        return _expected([(search.costs[n].share, powers[n, tests]) for n in names])

    while len(chosen) < search.rules.finalists:
        costs: Mapping[str, float] = {
            spec: expected(sorted([*chosen, spec], key=specs.index))
            for spec in specs
            if spec not in chosen
        }
        best = min(costs, key=costs.__getitem__, default=None)
        if best is None or costs[best] > least - _GAIN:
            break
        chosen, least = sorted([*chosen, best], key=specs.index), costs[best]
    return chosen


def chance(search: Search, spec: str, floor: float, level: float) -> float:
    """How likely the held-out images certify a pipeline, as the search has seen it.

    Args:
        search: that has seen it.
        spec: the pipeline.
        floor: share of the full model's score.
        level: largest p that certifies.
    """
    paired = search.paired(spec, SEARCH)
    if paired is None:
        return 0.0
    seen = paired.stakes(floor, search.judge.widest)
    size = search.judge.sizes[HELD_OUT]
    return Bets.after(seen).power(seen, size, level, search.rules.seed)


def _expected(tests: Sequence[tuple[float, float]]) -> float:
    """Cost of the cheapest that is certified, 1 where none is, were tests independent.

    Args:
        tests: (cost, chance), cheapest first.
    """
    total, left = 0.0, 1.0
    for cost, power in tests:
        total += left * power * cost
        left *= 1 - power
    return total + left
