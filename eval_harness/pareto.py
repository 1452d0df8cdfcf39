"""Accuracy against measured time to first token, over methods inside the tower and after it.

Once few tokens reach the language model, most of the time to the first token is the tower's, and
what acts after the tower cannot pass the floor (tower alone + prefill of the short prompt alone).
Here each setting inside the tower is combined with each method after it: times on a model of a
large shape with random weights, accuracy of the same pipelines on the reference model, at the same
share of tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from eval_harness import statistics
from eval_harness.pareto_plan import PUBLISHED, Plan, Point, published
from eval_harness.pareto_rounds import NOTHING, ask_round, time_round, tower_round
from eval_harness.provenance import source, versions
from eval_harness.resume import Part, measured
from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError
from vlmcompress.reference.study import digest
from vlmcompress.reference.weights import WEIGHTS_DIR

GOAL = 0.75
"""Share of the floor that a pipeline is to reach..."""
GOAL_KEEP = 0.1
MARGIN = 0.01
"""...within a point of the accuracy of its method after the tower alone."""


def sweep(
    plan: Plan,
    folder: str | Path,
    *,
    weights: str | Path = WEIGHTS_DIR,
    processes: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every combination; what was stopped goes on, and times outlive the weights.

    Args:
        plan: what to measure.
        folder: each finished part is kept there: a round of timings, or a pipeline's answers in a
            world. Timings are used again by other weights, answers by more rounds.
        weights: folder of a model that knows the scenes.
        processes: one-thread processes for the questions; timings run alone, in this one.
        progress: called with the name of each part that is there.

    Returns:
        JSON-ready: `machine`, `weights` (SHA-256), `questions`, `timing`, `rounds`, `full` and
        `blind` {world: estimate}, `floors` {keep: the floor over the unpatched TTFT}, `points`
        (see `_point`), `towers` {method: {setting, seconds and
        flops as shares of the tower without it}} and `goal` (see `goal`). Estimates are [mean,
        low, high]; ratios are medians over rounds of ratios taken within one.

    Raises:
        ConfigError: for weights that are not there.
    """
    file = Path(weights) / "model.safetensors"
    if not file.exists():
        raise ConfigError(f"{file} is not there: name a folder with trained weights.")
    turns = measured(_timing_parts(plan), folder, progress=progress)
    asked = measured(
        _question_parts(plan, Path(weights)), folder, processes=processes, progress=progress
    )
    rounds = [turns[f"ttft-{i}"] for i in range(plan.rounds)]
    n = _tokens(Path(weights))
    answers = {world: _World.of(plan, world, asked, n) for world in plan.questions}
    points = [
        _point(point, plan.tokens(point.keep), [_turn(turn, i) for turn in rounds], answers, n)
        for i, point in enumerate(plan.points())
    ]
    _mark_front(points, list(plan.questions))
    return {
        "machine": rounds[0]["machine"],
        "weights": digest(file),
        "questions": plan.questions,
        "timing": plan.timing.identity(),
        "rounds": plan.rounds,
        "full": {world: one.estimate("full", None) for world, one in answers.items()},
        "blind": {world: one.estimate("blind", None) for world, one in answers.items()},
        "floors": {str(keep): _floor(rounds, plan.tokens(keep)) for keep in plan.keeps},
        "points": points,
        "towers": _towers([turns[f"tower-{i}"] for i in range(plan.rounds)]),
        "goal": goal(points),
    }


def parts_of(plan: Plan, weights: str | Path = WEIGHTS_DIR) -> int:
    """How many parts a sweep has."""
    return len(_timing_parts(plan)) + len(_question_parts(plan, Path(weights)))


def _timing_parts(plan: Plan) -> list[Part]:
    configs = [(point.spec, plan.tokens(point.keep)) for point in plan.points()]
    towers = list(published().values())
    identity = plan.timing.identity()
    ttft = [
        Part(
            f"ttft-{i}",
            {**identity, "configs": configs, "turn": i},
            time_round,
            (plan.timing, configs, i),
        )
        for i in range(plan.rounds)
    ]
    tower = [
        Part(
            f"tower-{i}",
            {**identity, "towers": towers, "turn": i},
            tower_round,
            (plan.timing, towers, i),
        )
        for i in range(plan.rounds)
    ]
    return [*ttft, *tower]


def _question_parts(plan: Plan, weights: Path) -> list[Part]:
    """One part per world for the model as it is, and one per world and pipeline."""
    n = _tokens(weights)
    shared = {
        "split": plan.split,
        "weights": digest(weights / "model.safetensors"),
        "versions": versions(),
    }
    cells: list[tuple[tuple[str, ...], int | None]] = [((), None)]
    cells += [((p.spec,), keeping.count(p.keep, n)) for p in plan.points()]
    return [
        Part(
            _answers_name(world, specs, keep),
            {
                **shared,
                "world": world,
                "questions": asked,
                "specs": specs,
                "keep": keep,
                "source": [source(spec) for spec in specs],
            },
            ask_round,
            (world, asked, plan.split, weights, specs, keep),
        )
        for world, asked in plan.questions.items()
        for specs, keep in cells
    ]


def _tokens(weights: Path) -> int:
    """Tokens that the reference model makes of an image."""
    config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    return int(config["image_seq_length"])


def _answers_name(world: str, specs: Sequence[str], keep: int | None) -> str:
    spec = "-".join(specs) or "bare"
    plain = "".join(c if c.isalnum() or c == "." else "_" for c in spec)
    return f"{world}-{plain}-{keep}" if keep else f"{world}-{plain}"


@dataclass(frozen=True)
class _World:
    """Which questions of a world were answered rightly, by (spec, tokens kept).

    Attributes:
        right: {(spec, tokens): [questions] 0 or 1}; ("full", None) and ("blind", None) as well.
        kinds: [questions]. scenes: [questions].
    """

    right: dict[tuple[str, int | None], np.ndarray]
    kinds: np.ndarray
    scenes: np.ndarray

    @classmethod
    def of(cls, plan: Plan, world: str, asked: Mapping[str, Any], n: int) -> _World:
        """Of all parts; `n` tokens are an image of the reference model."""
        bare = asked[_answers_name(world, (), None)]
        rows: dict[tuple[str, int | None], np.ndarray] = {}
        rows.update({(name, None): _bits(row) for name, row in bare["right"].items()})
        for point in plan.points():
            keep = keeping.count(point.keep, n)
            part = asked[_answers_name(world, (point.spec,), keep)]
            rows[point.spec, keep] = _bits(part["right"][point.spec])
        return cls(rows, np.array(bare["kinds"]), np.array(bare["scenes"]))

    def estimate(
        self, spec: str, keep: int | None, minus: tuple[str, int | None] | None = None
    ) -> list[float]:
        """Accuracy, or its difference to another pipeline's, paired: [mean, low, high]."""
        row = self.right[spec, keep] - (0 if minus is None else self.right[minus])
        found = statistics.mean_over_kinds(row, self.kinds, self.scenes)
        return [round(value, 4) for value in (found.mean, found.low, found.high)]


def _bits(row: str) -> np.ndarray:
    return np.array([bit == "1" for bit in row], dtype=float)


def _turn(turn: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A round as one combination saw it."""
    own = {name: turn[name][index] for name in ("ttft", "tokens", "patches")}
    return {**turn, **own}


def _point(
    point: Point,
    tokens: int,
    rounds: Sequence[Mapping[str, Any]],
    worlds: Mapping[str, _World],
    n: int,
) -> dict[str, Any]:
    """What is reported of one combination.

    Args:
        point: the combination.
        tokens: its budget in the timed model.
        rounds: as it saw them.
        worlds: answers.
        n: tokens of an image of the reference model.

    Returns:
        `tower`, `connector`, `keep`, `spec`; `tokens` and `patches` (after each tower layer) of the
        timed model; `floor_ratio` (TTFT over its floor), `floor_range`, `ttft_ratio` (over the
        unpatched model) and `speedup`; `accuracy` {world: estimate} and `over_connector` {world:
        estimate}, the difference to the method after the tower alone.
    """
    ratios = [t["ttft"] / (t["tower"] + t["prefill"][str(tokens)]) for t in rounds]
    speedup = median(t["unpatched"] / t["ttft"] for t in rounds)
    keep = keeping.count(point.keep, n)
    alone = (point.connector, keep)
    return {
        "tower": point.tower,
        "connector": point.connector,
        "keep": point.keep,
        "spec": point.spec,
        "tokens": rounds[0]["tokens"],
        "patches": rounds[0]["patches"],
        "floor_ratio": round(median(ratios), 4),
        "floor_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "ttft_ratio": round(1 / speedup, 4),
        "speedup": round(speedup, 3),
        "accuracy": {name: world.estimate(point.spec, keep) for name, world in worlds.items()},
        "over_connector": {
            name: world.estimate(point.spec, keep, alone) for name, world in worlds.items()
        },
    }


def _floor(rounds: Sequence[Mapping[str, Any]], tokens: int) -> float:
    ratios = [(turn["tower"] + turn["prefill"][str(tokens)]) / turn["unpatched"] for turn in rounds]
    return round(median(ratios), 4)


def _mark_front(points: Sequence[dict[str, Any]], worlds: Sequence[str]) -> None:
    """Name, in every point, the worlds in which no other is as fast and more accurate."""
    for point in points:
        point["front"] = []
    for world in worlds:
        best = -math.inf
        by_time = sorted(points, key=lambda p: (p["ttft_ratio"], -p["accuracy"][world][0]))
        for point in by_time:
            if point["accuracy"][world][0] > best:
                best = point["accuracy"][world][0]
                point["front"].append(world)


def goal(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether a pipeline passes the floor without loss.

    Returns:
        `target` in words, `met`, and `specs`: the pipelines that meet it, fastest first.
    """
    meeting = [
        point
        for point in points
        if point["tower"]
        and point["keep"] == GOAL_KEEP
        and point["floor_ratio"] <= GOAL
        and all(estimate[0] >= -MARGIN for estimate in point["over_connector"].values())
    ]
    target = (
        f"keep {GOAL_KEEP}: TTFT at most {GOAL} of the floor, accuracy within "
        f"{100 * MARGIN:.0f} point of the method after the tower alone"
    )
    specs = [point["spec"] for point in sorted(meeting, key=lambda p: p["floor_ratio"])]
    return {"target": target, "met": bool(meeting), "specs": specs}


def _towers(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{method: its setting, and seconds and FLOPs as shares of the tower without it}."""
    rows = {}
    for name, spec in published().items():
        ratios = [turn["seconds"][spec] / turn["seconds"][NOTHING] for turn in rounds]
        rows[name] = {
            "setting": spec,
            "published": name in PUBLISHED,
            "patches": min(rounds[0]["patches"][spec]),
            "seconds": round(median(ratios), 4),
            "range": [round(min(ratios), 4), round(max(ratios), 4)],
            "flops": round(rounds[0]["flops"][spec], 4),
        }
    return rows
