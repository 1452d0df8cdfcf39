"""The plots of a page, as SVG that stands in its text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval_harness.asking import BLIND, FULL
from eval_harness.report.inputs import Bench, Run, label, share_kept
from vlmcompress.core.extras import require

_SIZE = (7.2, 4.2)
_STYLES: Mapping[str, dict[str, Any]] = {
    "random": {"color": "0.35", "linestyle": "--"},
    "uniform": {"color": "0.55", "linestyle": "--"},
    "pool": {"color": "0.55", "linestyle": "-."},
}
_GREYED = "0.6"


@dataclass(frozen=True)
class Timed:
    """A setting with its time.

    Attributes:
        label: of the setting; empty for the model without compression.
        method: of the setting.
        time: to the first token, over that with all tokens.
        score: accuracy, with its interval.
    """

    label: str
    method: str
    time: float
    score: Mapping[str, float]


def accuracy_against_keep(run: Run, task: str) -> str:
    """Accuracy and its interval against the share of visual tokens kept, one line per method."""
    rows = run.rows(task)
    figure, axes = _axes()
    for method, points in _by_method(rows).items():
        shares, means, lows, highs = zip(*points, strict=True)
        style = _STYLES.get(method, {})
        (line,) = axes.plot(shares, means, marker="o", markersize=4, label=method, **style)
        axes.fill_between(shares, lows, highs, color=line.get_color(), alpha=0.12, linewidth=0)
    for method, name, style in (
        (FULL, "all tokens", {"color": "black", "linewidth": 0.9}),
        (BLIND, "no picture", {"color": "grey", "linestyle": ":"}),
    ):
        for row in rows:
            if row["method"] == method:
                axes.axhline(row["score"]["mean"], label=name, **style)
    axes.set(
        xscale="log", xlabel="share of visual tokens kept, mean over layers", ylabel="accuracy"
    )
    axes.xaxis.set_major_formatter(_percent())
    axes.xaxis.set_minor_formatter(require("matplotlib.ticker").NullFormatter())
    ticks = sorted(
        {round(share_kept(row), 4) for row in rows if row["method"] not in (FULL, BLIND)}
    )
    axes.set_xticks(ticks or [1.0])
    axes.yaxis.set_major_formatter(_percent())
    return _svg(figure, axes, f"keep {task}")


def timed(run: Run, task: str, bench: Bench) -> list[Timed]:
    """Every setting of a task whose time a bench measured; the full model first."""
    found = []
    for row in run.rows(task):
        time = bench.ttft(row["method"], row["keep"])
        if time is not None and row["method"] != BLIND:
            name = "" if row["method"] == FULL else label(row["method"], row["keep"])
            found.append(Timed(name, row["method"], time, row["score"]))
    return found


def front(points: Iterable[Timed]) -> list[Timed]:
    """The points that no other is at least as fast and as accurate as, fastest first."""
    best: list[Timed] = []
    for point in sorted(points, key=lambda p: (p.time, -p.score["mean"])):
        if not best or point.score["mean"] > best[-1].score["mean"]:
            best.append(point)
    return best


def accuracy_against_time(points: Sequence[Timed], name: str) -> str:
    """Accuracy against the time to the first token, with the Pareto front.

    Args:
        points: of one task.
        name: of the task.
    """
    figure, axes = _axes()
    methods = list(dict.fromkeys(point.method for point in points if point.label))
    for point in points:
        mean, low, high = (point.score[key] for key in ("mean", "low", "high"))
        style: dict[str, Any] = {"color": "black", "fmt": "s"}
        if point.label:
            color = _STYLES.get(point.method, {}).get(
                "color", f"C{methods.index(point.method) % 10}"
            )
            style = {"color": color, "fmt": "o"}
        axes.errorbar(
            point.time,
            mean,
            yerr=[[mean - low], [high - mean]],
            markersize=5,
            elinewidth=0.6,
            label=point.label or "all tokens",
            **style,
        )
    steps = front(points)
    axes.step(
        [point.time for point in steps],
        [point.score["mean"] for point in steps],
        where="post",
        color="black",
        linewidth=0.9,
        zorder=0,
        label="Pareto front",
    )
    axes.set(xlabel="time to the first token, relative to all tokens", ylabel="accuracy")
    axes.yaxis.set_major_formatter(_percent())
    return _svg(figure, axes, f"time {name}")


def tokens_per_layer(lines: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Visual tokens in the attention of each layer of the language model.

    Args:
        lines: (what, tokens by layer).
    """
    figure, axes = _axes()
    for what, tokens in _together(lines):
        style = {"color": _GREYED} if what.endswith(": all tokens") else {}
        # The last value is drawn twice: a step as wide as the others.
        axes.step(range(len(tokens) + 1), [*tokens, tokens[-1]], where="post", label=what, **style)
    axes.set(xlabel="layer of the language model", ylabel="visual tokens", ylim=(0, None))
    axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True))
    return _svg(figure, axes, "layers")


def _together(lines: Sequence[tuple[str, Sequence[float]]]) -> list[tuple[str, Sequence[float]]]:
    """Settings with the same tokens in every layer as one line, which names them all."""
    found: dict[tuple[float, ...], list[str]] = {}
    for what, tokens in lines:
        found.setdefault(tuple(tokens), []).append(what)
    return [(_enumerated(names), tokens) for tokens, names in found.items()]


def _enumerated(names: Sequence[str]) -> str:
    """The names, with what all begin with said once."""
    subjects = {name.partition(": ")[0] for name in names}
    if len(names) == 1 or len(subjects) > 1:
        return ", ".join(names)
    return f"{subjects.pop()}: {', '.join(name.partition(': ')[2] for name in names)}"


def _by_method(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, ...]]]:
    """{method: [(share kept, mean, low, high), ...]} by rising share."""
    lines: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        if row["method"] in (FULL, BLIND):
            continue
        score = tuple(row["score"][key] for key in ("mean", "low", "high"))
        lines.setdefault(row["method"], []).append((share_kept(row), *score))
    return {method: sorted(points) for method, points in lines.items()}


def _axes() -> tuple[Any, Any]:
    figure = require("matplotlib.figure").Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _percent() -> Any:
    return require("matplotlib.ticker").PercentFormatter(1.0)


def _svg(figure: Any, axes: Any, name: str) -> str:
    """A figure with its legend as an `<svg>` element; the same text for the same data.

    Args:
        figure: drawn.
        axes: of it.
        name: of this figure alone on its page: what it refers to inside must not meet another's.
    """
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", framealpha=0.8)
    stream = io.StringIO()
    settings = {"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}
    with require("matplotlib").rc_context(settings):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :]
