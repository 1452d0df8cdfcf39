"""Pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmcompress.core.extras import require


def plot_curve(results: dict[str, Any], path: str | Path) -> Path:
    """Draw accuracy against the share of tokens kept, one line with its interval per method.

    Args:
        results: what `eval_harness.evaluate` returns.
        path: of the PNG or SVG to write.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure = require("matplotlib.figure").Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for method, points in _lines(results["accuracy"]).items():
        keeps, means, lows, highs = zip(*points, strict=True)
        (line,) = axes.plot(keeps, means, marker="o", markersize=3.5, label=method)
        axes.fill_between(keeps, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(results["blind"], color="grey", linestyle=":", label="no image")
    axes.set(xscale="log", xlabel="visual tokens kept", ylabel="accuracy", title=_title(results))
    ticks = sorted(map(float, results["accuracy"]))
    axes.set_xticks(ticks, [_share(keep) for keep in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(require("matplotlib.ticker").PercentFormatter(1.0))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return Path(path)


def plot_learning(log: dict[str, Any], path: str | Path) -> Path:
    """Draw what a training learned over its minutes: one row per run, one panel per stage.

    Args:
        log: what `vlmcompress.reference` writes as training_log.json.
        path: of the PNG or SVG to write.

    Raises:
        MissingExtraError: without matplotlib.
    """
    runs = [*log.get("before", []), log]
    size = (10.5, 4.2 * len(runs))
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    for row, run in zip(figure.subfigures(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
        stages = list(run["stages"])
        for axes, stage in zip(row.subplots(1, len(stages), sharey=True), stages, strict=True):
            for name, points in _learning(run["curve"], stage).items():
                axes.plot(*zip(*points, strict=True), marker=".", markersize=3, label=name)
            axes.set(title=_STAGES.get(stage, stage), xlabel="minutes", ylim=(0, 1.02))
            axes.legend(fontsize="x-small", loc="lower right")
    figure.savefig(path, dpi=130)
    return Path(path)


_STAGES = {
    "tower": "tower: patches and [CLS]",
    "language": "language model: simulated tokens",
    "joint": "joint: validation, all tokens",
}


def _learning(curve: list[dict[str, Any]], stage: str) -> dict[str, list[tuple[float, float]]]:
    """{what is measured: [(minutes, share), ...]}: the validation where a stage has one."""
    points = [point for point in curve if point["stage"] == stage]
    lines: dict[str, list[tuple[float, float]]] = {}
    validated = any("validation" in point for point in points)
    for point in points:
        if validated and "validation" not in point:
            continue
        whole = next(iter(point.get("validation", {}).values()), None)
        row = whole or point.get("patches") or point.get("training", {})
        for name, value in row.items():
            lines.setdefault(name, []).append((point["minutes"], value))
    return lines


def _lines(accuracy: dict[str, dict[str, dict[str, float]]]) -> dict[str, list[tuple[float, ...]]]:
    """{method: [(keep, mean, low, high), ...]} by rising keep."""
    lines: dict[str, list[tuple[float, ...]]] = {}
    for keep in sorted(accuracy, key=float):
        for method, row in accuracy[keep].items():
            lines.setdefault(method, []).append((float(keep), row["mean"], row["low"], row["high"]))
    return lines


def _share(keep: float) -> str:
    """A fraction as percent, a count as itself."""
    return f"{keep:.0f}" if keep > 1 else f"{100 * keep:g} %"


def _title(results: dict[str, Any]) -> str:
    return f"{results['n']} questions, 95 % intervals over images"
