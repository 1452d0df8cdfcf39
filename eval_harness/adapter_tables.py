"""Adapters and methods without training as tables, from results of `eval_harness.adapters`."""

from __future__ import annotations

from itertools import chain
from typing import Any

from eval_harness.statistics import tokdense

_RANDOM = "random"
Table = tuple[list[str], list[list[str]]]


def rows(results: dict[str, Any]) -> Table:
    """By count: the best methods without training, random dropping, every adapter; all tokens."""
    worlds = results["worlds"]
    header = ["tokens", "what", "trained"]
    for world in worlds:
        header += [f"{world} %", "minus the best without training", f"TokDense, {world}"]
    found = [_alone("all tokens", results, "full", results["tokens"])]
    for tokens in next(iter(worlds.values()))["at"]:
        for name in _names(results, tokens):
            found.append([tokens, *_named(results, name)])
            for world in worlds.values():
                found[-1] += _cells(world["at"][tokens], name)
    return header, [*found, _alone("no image", results, "blind", None)]


def own_rows(results: dict[str, Any]) -> Table:
    """Every adapter against its own method without training, and with LoRA alone.

    At each count that has both.
    """
    worlds = results["worlds"]
    header = ["tokens", "what", "instead of"]
    for world in worlds:
        header += [f"{world} %", "minus that"]
    found = []
    for tokens in next(iter(worlds.values()))["at"]:
        for name in results["adapters"]:
            pairs = [world["at"][tokens]["rows"].get(name, {}) for world in worlds.values()]
            for over, other in _others(results, tokens, name).items():
                if all(over in row for row in pairs):
                    cells = [(_range(row["accuracy"]), _gap(row[over])) for row in pairs]
                    found.append([tokens, *_link(name), other, *chain(*cells)])
    return header, found


def commands(results: dict[str, Any]) -> list[str]:
    """What trained the adapters, then what measured and compared them."""
    asked = results["plan"]["questions"]
    trained = [row["command"] for row in results["adapters"].values() if row["command"]]
    options = {"objects": "--questions", "text": "--text-questions"}
    sizes = " ".join(f"{options[world]} {n}" for world, n in asked.items())
    return [*trained, f"vlmcompress eval adapters --out eval_harness/results/adapters.json {sizes}"]


def _names(results: dict[str, Any], tokens: str) -> list[str]:
    """Rows of a count, in their order."""
    there = [world["at"][tokens] for world in results["worlds"].values()]
    best = dict.fromkeys(world["best"] for world in there)
    asked = [name for name in results["adapters"] if all(name in w["rows"] for w in there)]
    return [*dict.fromkeys((*best, _RANDOM)), *asked]


def _others(results: dict[str, Any], tokens: str, name: str) -> dict[str, str]:
    """What an adapter is compared with at a count, by the name of the difference."""
    method = _stem(results["adapters"][name]["method"])
    tuned = next(iter(results["worlds"].values()))["at"][tokens]["tuned"]
    others = {"over_own": f"`{method}`"}
    if method in tuned:
        others["over_lora"] = _link(tuned[method])[0]
    return others


def _named(results: dict[str, Any], name: str) -> list[str]:
    adapter = results["adapters"].get(name)
    if adapter is None:
        return [f"`{name}`", "nothing"]
    return [*_link(name), adapter["kind"]]


def _link(name: str) -> list[str]:
    return [f"[{name}]({name}/README.md)"]


def _cells(at: dict[str, Any], name: str) -> list[str]:
    row = at["rows"].get(name)
    if row is None:
        return ["-"] * 3
    over = "best" if name == at["best"] else _gap(row["over_best"])
    return [_range(row["accuracy"]), over, f"{tokdense(row['accuracy'][0], row['tokens']):.2f}"]


def _alone(what: str, results: dict[str, Any], name: str, tokens: int | None) -> list[str]:
    """A row of the model without any method."""
    found = ["0" if tokens is None else str(tokens), what, "nothing"]
    for world in results["worlds"].values():
        dense = "-" if tokens is None else f"{tokdense(world[name][0], tokens):.2f}"
        found += [_range(world[name]), "-", dense]
    return found


def _stem(spec: str) -> str:
    return spec.rpartition("|")[2].strip().partition("(")[0].partition(":")[0]


def _range(estimate: list[float]) -> str:
    mean, low, high = (100 * value for value in estimate)
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


def _gap(estimate: list[float]) -> str:
    mean, low, high = (100 * value for value in estimate)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
