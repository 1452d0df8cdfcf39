"""Tables of what `eval_harness.pareto` measured, as rows of text."""

from __future__ import annotations

from typing import Any, TypeAlias

Table: TypeAlias = tuple[list[str], list[list[str]]]


def points(results: dict[str, Any], *, code: bool = False) -> Table:
    """Every combination, fastest first: header and rows.

    Args:
        results: of a sweep.
        code: whether names are set as code.
    """
    worlds = list(results["questions"])
    header = ["in the tower", "after it", "keep", "TTFT / floor", "speed-up"]
    header += [f"{world}, %" for world in worlds]
    header += [f"{world}, against none in the tower" for world in worlds]
    header += ["on the front"]
    rows = [
        [
            _name(point["tower"], code) or "-",
            _name(point["connector"], code),
            str(point["keep"]),
            f"{point['floor_ratio']:.3f}",
            f"{point['speedup']:.2f}",
            *(_accuracy(point["accuracy"][world]) for world in worlds),
            *(_difference(point, world) for world in worlds),
            ", ".join(point["front"]) or "-",
        ]
        for point in sorted(results["points"], key=lambda point: point["ttft_ratio"])
    ]
    return header, rows


def towers(results: dict[str, Any], *, code: bool = False) -> Table:
    """The tower's time under each method inside it: header and rows."""
    header = ["in the tower", "setting", "fewest patches", "tower time", "range", "tower FLOPs"]
    rows = [
        [
            _name(row["setting"], code),
            "published" if row["published"] else "half",
            str(row["patches"]),
            f"{row['seconds']:.3f}",
            "{:.3f}-{:.3f}".format(*row["range"]),
            f"{row['flops']:.3f}",
        ]
        for row in sorted(results["towers"].values(), key=lambda row: row["seconds"])
    ]
    return header, rows


def goal(results: dict[str, Any]) -> str:
    """The goal and whether it is met, in a sentence."""
    found = results["goal"]
    target = f"{found['target'][0].upper()}{found['target'][1:]}"
    if not found["met"]:
        return f"{target}: no pipeline of these meets it."
    return f"{target}: {len(found['specs'])} pipelines meet it, the fastest is {found['specs'][0]}."


def _name(spec: str, code: bool) -> str:
    return f"`{spec}`" if code and spec else spec


def _accuracy(estimate: list[float]) -> str:
    mean, low, high = (100 * value for value in estimate)
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


def _difference(point: dict[str, Any], world: str) -> str:
    if not point["tower"]:
        return "-"
    mean, low, high = (100 * value for value in point["over_connector"][world])
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
