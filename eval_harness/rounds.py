"""Rounds of timed sides, and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any, TypeAlias

Sample: TypeAlias = dict[str, float]
Side: TypeAlias = Callable[[], Sample]

_STAGES = ("tower", "selection", "connector", "prefill")


def interleave(sides: dict[str, Side], repeats: int, warmup: int) -> dict[str, list[Sample]]:
    """Run every side once per round, each second round in reverse order (ABBA).

    Returns:
        {side: [sample of round 0, ...]} without the warm-up rounds.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for turn in range(-warmup, repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            sample = sides[name]()
            if turn >= 0:
                samples[name].append(sample)
    return samples


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th percentile and minimum."""
    p90 = quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"median": median(values), "p90": p90, "min": min(values)}


def timings(samples: dict[str, list[Sample]], side: str = "method") -> dict[str, Any]:
    """Times of a side: its TTFT, the median of each stage, and what the library itself reports."""
    rows = samples[side]
    found: dict[str, Any] = {
        "ttft": summary([row["ttft"] for row in rows]),
        "stages": {stage: median(row[stage] for row in rows) for stage in _STAGES},
    }
    reported = sorted({key for row in rows for key in row if key.startswith("reported_")})
    if side == "method":
        found["reported"] = {
            key.removeprefix("reported_"): median(row[key] for row in rows if key in row)
            for key in reported
        }
    return found


def against_floor(samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """Against the floor (tower alone + short prefill alone) and against the unpatched model.

    Ratios are medians over rounds; `floor_ratio_of_minima` compares the fastest runs instead, which
    disturbances only ever slow down.
    """
    method = [row["ttft"] for row in samples["method"]]
    tower = [row["seconds"] for row in samples["tower_alone"]]
    prefill = [row["seconds"] for row in samples["prefill_alone"]]
    baseline = [row["ttft"] for row in samples["baseline"]]
    rounds = list(zip(method, tower, prefill, strict=True))
    return {
        "floor_ratio": median(ttft / (alone + short) for ttft, alone, short in rounds),
        "floor_ratio_of_minima": min(method) / (min(tower) + min(prefill)),
        "speedup": median(b / m for b, m in zip(baseline, method, strict=True)),
        "tower_alone": summary(tower),
        "prefill_alone": summary(prefill),
    }


def against_ideal(samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """The prefill of a method inside the LLM over its layers alone, round by round."""
    if "layers_alone" not in samples:
        return {"ideal_ratio": None}
    alone = [row["seconds"] for row in samples["layers_alone"]]
    prefill = [row["prefill"] for row in samples["method"]]
    return {
        "ideal_ratio": median(p / a for p, a in zip(prefill, alone, strict=True)),
        "layers_alone": summary(alone),
    }


def evidence(samples: dict[str, list[Sample]]) -> dict[str, float | None] | None:
    """What looking at the tower costs: with it minus without it, round by round."""
    if "no_evidence" not in samples:
        return None
    on = [row["tower"] for row in samples["method"]]
    off = [row["tower"] for row in samples["no_evidence"]]
    rows = samples["method"]
    reported = [row["reported_evidence"] for row in rows if "reported_evidence" in row]
    direct = median(reported) if reported else None
    pairs = list(zip(on, off, strict=True))
    return {
        "tower_on": median(on),
        "tower_off": median(off),
        "difference": median(a - b for a, b in pairs),
        "share_of_tower": median((a - b) / b for a, b in pairs),
        "reported": direct,
        "reported_share_of_tower": None if direct is None else direct / median(off),
    }
