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


def plot_comparison(results: dict[str, Any], path: str | Path) -> Path:
    """Draw accuracy against the share of tokens kept: one panel per world, controls in grey.

    Args:
        results: what `eval_harness.comparison.compare` returns.
        path: of the PNG or SVG to write.

    Raises:
        MissingExtraError: without matplotlib.
    """
    worlds, mode = results["worlds"], results["plan"]["positions"][0]
    size = (5.4 * len(worlds), 4.6)
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(worlds), squeeze=False)[0]
    for axes, (world, found) in zip(panels, worlds.items(), strict=True):
        for method, points in _drawn(found["accuracy"][mode], results["methods"]).items():
            keeps, means, lows, highs = zip(*points, strict=True)
            style = _CONTROL_STYLES.get(method, {})
            (line,) = axes.plot(keeps, means, marker="o", markersize=3, label=method, **style)
            axes.fill_between(keeps, lows, highs, color=line.get_color(), alpha=0.1, linewidth=0)
        axes.axhline(found["full"][0], color="black", linewidth=0.8, label="all tokens")
        axes.axhline(found["blind"][0], color="grey", linestyle=":", label="no image")
        title = f"{world}: {found['questions']} questions"
        axes.set(xscale="log", xlabel="visual tokens kept", ylabel="accuracy", title=title)
        ticks = sorted(map(float, found["accuracy"][mode]))
        axes.set_xticks(ticks, [_share(keep) for keep in ticks])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(require("matplotlib.ticker").PercentFormatter(1.0))
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize="small",
    )
    figure.savefig(path, dpi=130)
    return Path(path)


_MAIN = ("vtc_cls", "divprune", "visionzip", "scope", "cdpruner", "tome", "evit", "tome_tower")
_CONTROL_STYLES: dict[str, dict[str, Any]] = {
    "random": {"color": "0.35", "linestyle": "--"},
    "uniform": {"color": "0.55", "linestyle": "--"},
    "pool": {"color": "0.55", "linestyle": "-."},
    "oracle": {"color": "0.35", "linestyle": ":"},
}


def _drawn(
    accuracy: dict[str, dict[str, list[float]]], methods: dict[str, Any]
) -> dict[str, list[tuple[float, ...]]]:
    """{method: [(keep, mean, low, high), ...]} of the main methods and the controls."""
    return {
        name: [(float(keep), *accuracy[keep][name]) for keep in keeps]
        for name in (*_MAIN, *_CONTROL_STYLES)
        if name in methods
        for keeps in [sorted((k for k in accuracy if name in accuracy[k]), key=float)]
        if keeps
    }


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
        panels = row.subplots(1, len(stages), sharey=True, squeeze=False)[0]
        for axes, stage in zip(panels, stages, strict=True):
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


def plot_pareto(results: dict[str, Any], path: str | Path) -> Path:
    """Draw accuracy against measured time to first token, one panel per world.

    Args:
        results: what `eval_harness.pareto.sweep` returns.
        path: of the PNG or SVG to write.

    Raises:
        MissingExtraError: without matplotlib.
    """
    worlds = list(results["questions"])
    size = (5.6 * len(worlds) + 3.4, 4.6)
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(worlds), squeeze=False)[0]
    for axes, world in zip(panels, worlds, strict=True):
        _pareto_panel(axes, results, world)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="x-small")
    figure.savefig(path, dpi=150)
    return Path(path)


def _pareto_panel(axes: Any, results: dict[str, Any], world: str) -> None:
    """One world: a colour per setting inside the tower, a marker per method after it."""
    points = results["points"]
    towers = list(dict.fromkeys(point["tower"] for point in points))
    connectors = list(dict.fromkeys(point["connector"] for point in points))
    for point in points:
        mean, low, high = point["accuracy"][world]
        axes.errorbar(
            point["ttft_ratio"],
            mean,
            yerr=[[mean - low], [high - mean]],
            fmt=_MARKERS[connectors.index(point["connector"]) % len(_MARKERS)],
            color=f"C{towers.index(point['tower']) % 10}",
            markersize=5,
            elinewidth=0.4,
            label=_pareto_label(point, len({p["keep"] for p in points}) > 1),
        )
    front = sorted(_front(points, world))
    axes.step(*zip(*front, strict=True), where="post", color="black", linewidth=0.8, zorder=0)
    for keep, floor in results["floors"].items():
        label = f"floor at {_share(float(keep))}"
        axes.axvline(floor, color="grey", linestyle=":", linewidth=0.8, label=label)
    title = f"{world}: {results['questions'][world]} questions, 95 % intervals over images"
    axes.set(xlabel="TTFT, share of the unpatched model's", ylabel="accuracy", title=title)
    axes.title.set_fontsize("small")
    axes.yaxis.set_major_formatter(require("matplotlib.ticker").PercentFormatter(1.0))


_MARKERS = "osD^v"


def _front(points: list[dict[str, Any]], world: str) -> list[tuple[float, float]]:
    """(time, accuracy) of the points that no other beats in both."""
    return [(p["ttft_ratio"], p["accuracy"][world][0]) for p in points if world in p["front"]]


def _pareto_label(point: dict[str, Any], several: bool) -> str:
    return f"{point['spec']} at {_share(point['keep'])}" if several else str(point["spec"])
