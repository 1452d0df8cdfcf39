"""Finds a pipeline for a model and a user's questions, and writes it down with the evidence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eval_harness import machine
from eval_harness.provenance import versions
from eval_harness.sweep import store
from eval_harness.tune import confirm, halving, space
from eval_harness.tune.budget import ALL, COSTS, SEARCHED, Budget
from eval_harness.tune.confirm import Chosen, Verdict
from eval_harness.tune.evidence import share_kept
from eval_harness.tune.finalists import worth_testing
from eval_harness.tune.goal import Goal
from eval_harness.tune.halving import Decision, Rules, Search
from eval_harness.tune.judge import SEARCH, Cost, Judge
from eval_harness.tune.models import ModelJudge
from eval_harness.tune.plan import TunePlan
from eval_harness.tune.samples import Samples
from vlmcompress.core.config import CONFIG_NAME, CompressionConfig
from vlmcompress.core.errors import ConfigError

EVIDENCE = "tune.json"
_NEAREST = 2
_PARTS, _TESTED = "parts", "tested.json"


def tune(
    plan: TunePlan,
    folder: str | Path,
    load: Callable[[], tuple[Any, Any, Any]],
    *,
    budget: Budget | None = None,
    fresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Search, test, and write `vlmcompress_config.json` and `tune.json`.

    What a stopped run has kept is not done again, and the decisions are the same. Without an
    admissible pipeline no configuration is written, and one that an earlier run left is deleted.

    Args:
        plan: what is searched.
        folder: of the results, of this search alone.
        load: gives model, processor and what `patch` takes as `clip`.
        budget: how long it may take; this call's, kept steps cost nothing.
        fresh: forget what is kept, pipelines that were tested on the same samples included.
        progress: called with a line of text after each step and decision.

    Returns:
        What `tune.json` holds (docs/tuning.md).

    Raises:
        ConfigError: for questions or a space that cannot be used.
        ResultsError: for a folder that another run writes to, or a full disk.
    """
    folder, budget = Path(folder), budget or Budget()
    say = progress or (lambda line: None)
    samples = Samples.read(plan.tasks, held_out=plan.held_out, seed=plan.rules.seed)
    with store.locked(folder):
        if fresh:
            _forget(folder)
        model, processor, clip = load()
        specs = plan.space or space.default(_diagnosis(model))
        plan = replace(plan, space=specs)
        judge = ModelJudge(model, processor, clip, plan, samples, folder / _PARTS, budget, tick=say)
        ledger = _Ledger(folder / _TESTED, {**plan.answers(), **samples.identity})
        search, verdict = choose(judge, specs, plan.goal, plan.rules, budget, ledger.enter, say)
        told = {
            **verdict.to_dict(),
            "goal": {**plan.goal.to_dict(), "text": str(plan.goal)},
            "cost": plan.cost,
            "space": _space(search, specs, verdict),
            "decisions": search.decisions,
            "asked": {"questions": search.asked, "exhaustive": _exhaustive(samples, specs)},
            "samples": {
                "images": samples.sizes,
                "questions": samples.questions,
                "unreadable": samples.unreadable,
                **samples.identity,
            },
            "options": {**plan.answers(), **plan.times(), "rules": asdict(plan.rules)},
            "seconds": budget.spent,
            "versions": versions(),
            "machine": machine.describe(model),
        }
        _write(folder, told, verdict, plan)
    return told


def choose(
    judge: Judge,
    specs: Sequence[str],
    goal: Goal,
    rules: Rules,
    budget: Budget,
    enter: Callable[[Sequence[str]], Sequence[str]] = lambda tests: tests,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Search, Verdict]:
    """Cost, search and test, whoever answers.

    Args:
        judge: answers.
        specs: the space.
        goal: what is admissible.
        rules: of the search.
        budget: of all of it.
        enter: notes which tests are going to be made of the held-out samples; returns all that
            ever were.
        say: called with each decision as a line.

    Raises:
        ConfigError: when none of the pipelines can be run.
    """
    with budget.until(COSTS):
        known = judge.costs(specs)
    costs = {spec: cost for spec, cost in known.items() if isinstance(cost, Cost)}
    if known and not costs:
        spec, why = next(iter(known.items()))
        raise ConfigError(f"None of the pipelines of the space can be run. {spec}: {why}")
    order = sorted(costs, key=lambda spec: costs[spec].share)
    search = Search(
        judge, {spec: costs[spec] for spec in order}, rules, lambda row: say(_line(row))
    )
    for spec in specs:
        if spec not in costs:
            search.decide(spec, "dropped", why=str(known.get(spec, "no time to measure its cost")))
    if goal.keep_accuracy is None:
        with budget.until(SEARCHED):
            finalists = halving.under_ceiling(search, goal.ceiling or 0.0)
        test = confirm.under_ceiling
    else:
        with budget.until(SEARCHED):
            alive = halving.towards_floor(search, goal.keep_accuracy)
        tested = enter(())
        finalists = worth_testing(search, alive, goal.keep_accuracy, goal.alpha, tested)
        finalists = finalists or _nearest(search, goal.alpha)
        test = confirm.of_floor
    for spec in finalists:
        search.decide(spec, "finalist")
    tests = len(enter([search.test_of(spec) for spec in finalists]))
    with budget.until(ALL):
        verdict = test(search, finalists, goal, tests)
    for row in verdict.finalists:
        chosen = getattr(verdict.outcome, "pipeline", None) == row["pipeline"]
        is_chosen = isinstance(verdict.outcome, Chosen) and chosen
        search.decide(row["pipeline"], "chosen" if is_chosen else "not chosen", p=row["p"])
    return search, verdict


def _nearest(search: Search, alpha: float) -> list[str]:
    """Where nothing can pass: the pipelines whose test can tell most of which floor is reached.

    Those of which the search's own images would show most, cheapest first. More than one, since
    one may have been dropped after few images.
    """
    shown = {
        spec: share_kept(paired, paired, search.judge.widest, alpha)
        for spec in search.costs
        for paired in [search.paired(spec, SEARCH)]
        if paired is not None
    }
    best = sorted(shown, key=shown.__getitem__, reverse=True)[:_NEAREST]
    return [spec for spec in search.costs if spec in best]


class _Ledger:
    """Every test that was ever made of the held-out samples of a folder.

    A run with other options may test other pipelines on the same samples; all share `alpha`.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        """With whatever the samples and answers depend on."""
        self._file, self._identity = file, json.loads(json.dumps(identity))

    def enter(self, tests: Sequence[str]) -> list[str]:
        """Note tests before they are made; all that ever were.

        Raises:
            ConfigError: for a damaged file.
        """
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            kept = {}
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{str(self._file)!r} is damaged ({error}), so that it is not known what was "
                "tested; start anew with --fresh."
            ) from error
        before = kept.get("tests", []) if kept.get("identity") == self._identity else []
        every = [*dict.fromkeys([*before, *tests])]
        if tests:
            store.write_json(self._file, {"identity": self._identity, "tests": every})
        return every


def _diagnosis(model: Any) -> Any:
    from vlmcompress.doctor import diagnose

    return diagnose(model)


def _space(search: Search, specs: Sequence[str], verdict: Verdict) -> list[dict[str, Any]]:
    """One row per pipeline, in the order of costs; those without a cost last."""
    rows = []
    for spec in [*search.costs, *(s for s in specs if s not in search.costs)]:
        cost, paired = search.costs.get(spec), search.paired(spec, SEARCH)
        last = next((d for d in reversed(search.decisions) if d["pipeline"] == spec), None)
        rows.append(
            {
                "pipeline": spec,
                "cost": None if cost is None else cost.share,
                "cost_facts": None if cost is None else dict(cost.facts),
                "images": 0 if paired is None else len(paired.counts),
                "kept": None if paired is None else paired.kept,
                "decision": "waited" if last is None else last["decision"],
                "why": None if last is None else last.get("why"),
            }
        )
    return rows


def _exhaustive(samples: Samples, specs: Sequence[str]) -> int:
    """Questions that asking all pipelines and the full model everything would take."""
    return (1 + len(specs)) * sum(samples.questions.values())


def _write(folder: Path, told: dict[str, Any], verdict: Verdict, plan: TunePlan) -> None:
    """The configuration last, so that it never stands beside other evidence than its own."""
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    store.write_json(folder / EVIDENCE, told)
    if isinstance(verdict.outcome, Chosen):
        positions: Any = plan.positions
        config = CompressionConfig.from_spec(
            verdict.outcome.pipeline, positions=positions, seed=plan.rules.seed
        )
        store.write_json(folder / CONFIG_NAME, config.to_dict())


def _forget(folder: Path) -> None:
    """Delete what a run left, and nothing else."""
    for part in (folder / _PARTS).glob("*.json"):
        part.unlink()
    for name in (EVIDENCE, CONFIG_NAME, _TESTED):
        (folder / name).unlink(missing_ok=True)


def _line(row: Decision) -> str:
    """A decision for a reader."""
    why = f": {row['why']}" if row.get("why") else ""
    return f"{row['pipeline'] or ''} {row['decision']}{why}".strip()
