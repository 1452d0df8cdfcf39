"""Rounds of timed sides, and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median, quantiles, stdev
from typing import Any, TypeAlias, TypeVar

Sample: TypeAlias = dict[str, float]
Side: TypeAlias = Callable[[], Sample]
S = TypeVar("S")

_PERCENTILES = (90, 95, 99)


def interleave(
    sides: Mapping[str, Callable[[], S]], repeats: int, warmup: int
) -> dict[str, list[S]]:
    """Run every side once per round, each second round in reverse order (ABBA).

    Returns:
        {side: [sample of round 0, ...]} without the warm-up rounds.
    """
    samples: dict[str, list[S]] = {name: [] for name in sides}
    for turn in range(-warmup, repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            sample = sides[name]()
            if turn >= 0:
                samples[name].append(sample)
    return samples


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, mean, standard deviation (0 of one value), percentiles 90, 95 and 99, minimum."""
    several = len(values) > 1
    cuts = quantiles(values, n=100, method="inclusive") if several else list(values) * 99
    return {
        "median": median(values),
        "mean": fmean(values),
        "stdev": stdev(values) if several else 0.0,
        **{f"p{cut}": cuts[cut - 1] for cut in _PERCENTILES},
        "min": min(values),
    }


def stages(row: Sample, reported: bool = True) -> Sample:
    """One call's seconds by stage, in the order of the path; without `processor` they sum to TTFT.

    Args:
        row: what `timed_call` measured, `processor` and what the library reported of the same call.
        reported: whether the library's own clock is the one that took the row's times: then the
            evidence is told apart from the tower around it, and the selection from the rest.

    Returns:
        `processor` (where it was run), `tower`, `evidence`, `selection`, `connector`, `prefill` and
        `other`: embedding look-up, placing the features, masks; the selection too where it is not
        told apart.
    """
    evidence = row.get("reported_evidence", 0.0) if reported else 0.0
    selection = row.get("reported_selection", 0.0) if reported else 0.0
    return {
        **({"processor": row["processor"]} if "processor" in row else {}),
        "tower": row["tower"] - evidence,
        "evidence": evidence,
        "selection": selection,
        "connector": row["connector"],
        "prefill": row["prefill"],
        "other": row["selection"] - selection,
    }


def timings(
    samples: dict[str, list[Sample]], side: str = "method", reported: bool = True
) -> dict[str, Any]:
    """Times of a side: TTFT, the median of each stage, and what the library itself reports.

    Args:
        samples: of all rounds.
        side: which one.
        reported: as `stages` takes it.
    """
    rows = samples[side]
    split = [stages(row, reported) for row in rows]
    found: dict[str, Any] = {
        "ttft": summary([row["ttft"] for row in rows]),
        "ttft_from_image": _from_image(rows),
        "stages": {stage: median(row[stage] for row in split) for stage in split[0]},
    }
    names = sorted({key for row in rows for key in row if key.startswith("reported_")})
    if side == "method":
        found["reported"] = {
            key.removeprefix("reported_"): median(row[key] for row in rows if key in row)
            for key in names
        }
    return found


def _from_image(rows: Sequence[Sample]) -> dict[str, float] | None:
    if "processor" not in rows[0]:
        return None
    return summary([row["processor"] + row["ttft"] for row in rows])


def _speedup_from_image(samples: dict[str, list[Sample]]) -> float | None:
    rows = list(zip(samples["baseline"], samples["method"], strict=True))
    if any("processor" not in row for pair in rows for row in pair):
        return None
    return median((b["processor"] + b["ttft"]) / (m["processor"] + m["ttft"]) for b, m in rows)


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
        "speedup_from_image": _speedup_from_image(samples),
        "tower_alone": summary(tower),
        "prefill_alone": summary(prefill),
    }


def against_ideal(samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """The prefill over each layer of the language model alone at its own length, by round."""
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
