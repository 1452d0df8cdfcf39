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
