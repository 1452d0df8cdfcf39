"""What the answers of a sweep say: scores, paired differences, tests, tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from eval_harness import pairs, statistics
from eval_harness.sweep.metrics import metric_of
from eval_harness.sweep.plan import SweepPlan
from eval_harness.sweep.settings import RANDOM, Setting

_TOKENS = ("tokens_in", "tokens_out", "visual_in", "visual_kept")
_OVER_FULL, _OVER_RANDOM = "over_full", "over_random"


class Run(Protocol):
    """One run of one setting; see `run.Cell`."""

    @property
    def setting(self) -> Setting:
        """The method and what it keeps."""


def summary(
    plan: SweepPlan,
    tasks: Mapping[str, Any],
    rows: Callable[[str, Any], Iterable[dict[str, Any]]],
    cells: Sequence[Run],
) -> dict[str, Any]:
    """Everything that is told of a sweep, JSON-ready.

    Args:
        plan: what was asked.
        tasks: {name: what its questions depend on}.
        rows: the lines of a task and a run, in order of their index.
        cells: all runs.

    Returns:
        `sweep` (what all answers depend on), `failed` (answers that there are not) and `tasks`
        {name: `identity`, `metric`, `questions`, `images` and `rows`, one per setting that answered
        anything or failed to}. docs/evaluating.md explains a row.
    """
    told: dict[str, Any] = {}
    for name, identity in tasks.items():
        found: dict[Setting, _Column] = {}
        for setting in plan.settings:
            runs = [_Column.of(rows(name, cell)) for cell in cells if cell.setting == setting]
            found[setting] = _Column.mean(runs)
        told[name] = {"identity": identity, **_task(plan, found)}
    lines = [row for task in told.values() for row in task["rows"]]
    for family in (_OVER_FULL, _OVER_RANDOM):
        _adjust([row[family] for row in lines if (row[family] or {}).get("p") is not None])
    failed = sum(row["failed"] for row in lines)
    return {"sweep": plan.identity(), "failed": failed, "tasks": told}


def overhead(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds of all processes together, by what they went to.

    Args:
        reports: {what: seconds} of each process, `all` being everything.

    Returns:
        The sums, `harness` (what is left of `all`: scoring, writing, keeping books) and
        `harness_share` (of the model's time; 0 where the model did nothing).
    """
    names = dict.fromkeys(name for report in reports for name in report)
    sums = {name: sum(report.get(name, 0.0) for report in reports) for name in names}
    harness = 2 * sums.get("all", 0.0) - sum(sums.values())
    model = sums.get("model", 0.0)
    return {**sums, "harness": harness, "harness_share": harness / model if model else 0.0}


@dataclass(frozen=True)
class _Column:
    """The answers of a setting, by question.

    Attributes:
        scores: [n] in [0, 1]; NaN where there is none.
        images: [n] what is drawn together; empty texts where nothing was asked.
        kinds: [n] of the questions.
        metrics: [n] of the questions.
        failed: answers that there are not.
        why: the first reason.
        tokens: {name: mean over answers}.
        layers: mean visual tokens in each layer; empty where all see the same.
        rates: of metrics that tell more than a mean.
    """

    scores: np.ndarray
    images: np.ndarray
    kinds: np.ndarray
    metrics: np.ndarray
    failed: int
    why: str | None
    tokens: dict[str, float]
    layers: tuple[float, ...]
    rates: dict[str, float]

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> _Column:
        """One run."""
        tally = _Tally()
        for row in rows:
            tally.add(row)
        return tally.column()

    @classmethod
    def mean(cls, runs: Sequence[_Column]) -> _Column:
        """Several runs as one: the mean of each question over those that answered it."""
        if len(runs) == 1:
            return runs[0]
        widest = max(runs, key=lambda run: len(run.scores))
        n = len(widest.scores)
        padded = [np.pad(r.scores, (0, n - len(r.scores)), constant_values=np.nan) for r in runs]
        known = np.sum([~np.isnan(row) for row in padded], axis=0)
        total = np.nansum(padded, axis=0)
        return cls(
            np.divide(total, known, out=np.full(n, np.nan), where=known > 0),
            widest.images,
            widest.kinds,
            widest.metrics,
            sum(run.failed for run in runs),
            next((run.why for run in runs if run.why), None),
            _mean_of([run.tokens for run in runs]),
            runs[0].layers,
            _mean_of([run.rates for run in runs]),
        )

    @property
    def answered(self) -> np.ndarray:
        """[n] whether there is a score."""
        return ~np.isnan(self.scores)


class _Tally:
    """Adds up the lines of a run; what it keeps of each is a few numbers and names."""

    def __init__(self) -> None:
        self.fields: dict[str, list[Any]] = {
            name: [] for name in ("score", "image_id", "kind", "metric")
        }
        self.failed, self.why = 0, None
        self.sums = dict.fromkeys(_TOKENS, 0)
        self.layers: np.ndarray | None = None
        self.said: dict[str, tuple[list[str], list[str]]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a line; those that are missing before it have no score."""
        missing = row["index"] - len(self.fields["score"])
        self.fields["score"] += [np.nan] * missing
        for name in ("image_id", "kind", "metric"):
            self.fields[name] += [""] * missing + [row[name]]
        self.fields["score"].append(np.nan if row["error"] else row["score"])
        if row["error"]:
            self.failed += 1
            self.why = self.why or row["error"]
            return
        for name in _TOKENS:
            self.sums[name] += row[name]
        if "visual_layers" in row:
            seen = np.array(row["visual_layers"], dtype=float)
            self.layers = seen if self.layers is None else self.layers + seen
        if metric_of(row["metric"]).rates:
            said, right = self.said.setdefault(row["metric"], ([], []))
            said.append(row["prediction"])
            right.append(row["answers"][0])

    def column(self) -> _Column:
        """What was added."""
        scores = np.array(self.fields["score"], dtype=float)
        n = int((~np.isnan(scores)).sum())
        rates: dict[str, float] = {}
        for metric, (said, right) in self.said.items():
            tell = metric_of(metric).rates
            rates.update(tell(said, right) if tell else {})
        return _Column(
            scores,
            np.array(self.fields["image_id"], dtype=str),
            np.array(self.fields["kind"], dtype=str),
            np.array(self.fields["metric"], dtype=str),
            self.failed,
            self.why,
            {name: total / n for name, total in self.sums.items()} if n else {},
            () if self.layers is None else tuple((self.layers / n).tolist()),
            rates,
        )


def _task(plan: SweepPlan, found: Mapping[Setting, _Column]) -> dict[str, Any]:
    full = found[plan.settings[0]]
    rows = []
    for setting, column in found.items():
        random = next(
            (c for s, c in found.items() if (s.method, s.keep) == (RANDOM, setting.against)), None
        )
        compared = setting.compresses or bool(setting.adapter)
        rows.append(
            {
                **_row(setting, column, plan.seed),
                _OVER_FULL: None
                if setting == plan.settings[0]
                else _over(column, full, plan, compared),
                _OVER_RANDOM: _over(column, random, plan, compared) if random else None,
            }
        )
    return {
        "metric": "+".join(sorted(set(full.metrics) - {""})),
        "questions": len(full.scores),
        "images": len(set(full.images) - {""}),
        "rows": rows,
    }


def _row(setting: Setting, column: _Column, seed: int) -> dict[str, Any]:
    there = column.answered
    kinds = sorted(set(column.kinds[there]) - {""})
    return {
        "method": setting.shown,
        "keep": setting.keep,
        "runs": setting.runs,
        "answered": int(there.sum()),
        "failed": column.failed,
        "why": column.why,
        "score": _score(column, seed) if there.any() else None,
        "by_kind": {
            str(kind): float(column.scores[there & (column.kinds == kind)].mean()) for kind in kinds
        },
        "rates": column.rates,
        "tokens": column.tokens,
        "visual_layers": list(column.layers),
    }


def _score(column: _Column, seed: int) -> dict[str, float]:
    """The mean with its interval.

    Where all or no answers are right, resampling shows no doubt; Wilson's interval does, with
    images for questions.
    """
    there = column.answered
    scores, images = column.scores[there], column.images[there]
    if scores.min() == scores.max() and scores[0] in (0, 1):
        n = len(set(images))
        return statistics.proportion(int(scores[0]) * n, n).to_dict()
    return pairs.mean_by_image(scores, images, seed=seed).to_dict()


def _over(column: _Column, other: _Column, plan: SweepPlan, tested: bool) -> dict[str, Any] | None:
    """A setting minus another on the questions that both answered; None without any."""
    n = min(len(column.scores), len(other.scores))
    both = column.answered[:n] & other.answered[:n]
    if not both.any():
        return None
    one, two, images = column.scores[:n][both], other.scores[:n][both], column.images[:n][both]
    found: dict[str, Any] = {
        "questions": int(both.sum()),
        **pairs.mean_by_image(one - two, images, seed=plan.seed).to_dict(),
    }
    if not tested:
        return found
    metrics = set(column.metrics[:n][both])
    whole = np.isin(one, (0, 1)).all() and np.isin(two, (0, 1)).all()
    binary = whole and all(metric_of(metric).binary for metric in metrics)
    return {
        **found,
        "mcnemar": pairs.mcnemar(one, two) if binary else None,
        "p": pairs.sign_flip(one - two, images, seed=plan.seed),
    }


def _adjust(tests: Sequence[dict[str, Any]]) -> None:
    """Write Holm's values of one family of tests beside them."""
    for test, p in zip(tests, pairs.holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p


def _mean_of(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    there = [one for one in dicts if one]
    return {name: float(np.mean([one[name] for one in there])) for name in (there or [{}])[0]}
