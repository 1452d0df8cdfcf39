"""The table of methods inside the language model, from results of `eval_harness.layerwise`."""

from __future__ import annotations

from typing import Any

from eval_harness.statistics import tokdense

HEADER = [
    "method",
    "average wanted",
    "measured",
    "behind the last site",
    "FLOPs of prefill",
    "accuracy %",
    "TokDense",
    "minus random dropping",
]


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, budget by budget, the best first; budgets of their own last."""
    found = sorted(results["rows"], key=_place)
    return HEADER, [_row(row, results["tokens"]) for row in found]


def _place(row: dict[str, Any]) -> tuple[float, float]:
    wanted, accuracy = row["wanted"], row["accuracy"]
    return (-(wanted or 0), -(accuracy[0] if accuracy else -1))


def _row(row: dict[str, Any], tokens: int) -> list[str]:
    wanted = "its own" if row["wanted"] is None else f"{row['wanted']:g}"
    if row["refused"] is not None:
        return [
            f"`{row['method']}`",
            wanted,
            "cannot: its first site is too late",
            *["-"] * (len(HEADER) - 3),
        ]
    return [
        f"`{row['method']}`",
        wanted,
        f"{row['average']:.3f}",
        f"{row['left'][-1]:.1f} of {tokens}",
        f"{row['flops']:.3f}",
        _percent(row["accuracy"]),
        f"{tokdense(row['accuracy'][0], row['average'] * tokens):.2f}",
        "-" if row["over_random"] is None else _percent(row["over_random"], "+"),
    ]


def _percent(estimate: list[float], sign: str = "") -> str:
    mean, low, high = (100 * x for x in estimate)
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def adaptive_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of trained thresholds against tuned schedules; differences are paired."""
    header = ["method", "layers", "FLOPs of prefill", "accuracy %", "trained minus this"]
    found = []
    for name, accuracy in results["accuracy"].items():
        difference, layers = results["difference"].get(name), results["layers"].get(name)
        found.append(
            [
                f"`{name}`",
                "its own" if layers is None else " ".join(map(str, layers)),
                f"{results['flops'][name]:.4f}",
                _percent(_listed(accuracy)),
                "-" if difference is None else _percent(_listed(difference), "+"),
            ]
        )
    return header, found


def _listed(estimate: dict[str, float]) -> list[float]:
    return [estimate[name] for name in ("mean", "low", "high")]


def time_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of times, from results of `vlmcompress bench` on one shape."""
    header = ["method", "keep", "visual tokens per layer", "KV MiB", "TTFT", "TPOT", "prefill"]
    first = results["configs"][0]["baseline"]
    found = [["unpatched", "-", *_held(first), "1.00", "1.00", "1.000"]]
    for row in results["configs"]:
        before, after = row["baseline"]["tpot"], row["tpot"]
        pace = "-" if before is None or after is None else f"{after / before:.2f}"
        ideal = "-" if row["ideal_ratio"] is None else f"{row['ideal_ratio']:.3f}"
        name = [f"`{row['method']}`", str(row["keep"])]
        found.append([*name, *_held(row), f"{1 / row['speedup']:.2f}", pace, ideal])
    return header, found


def _held(row: dict[str, Any]) -> list[str]:
    layers = row["tokens_in_layers"]
    return [f"{sum(layers) / len(layers):.1f}", f"{row['kv_bytes'] / 2**20:.2f}"]
