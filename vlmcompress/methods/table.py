"""The table of methods, made from the classes: for the documentation and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import takewhile
from typing import Any

from vlmcompress.methods import registry
from vlmcompress.methods.base import Layer, Method, TokenCompressor
from vlmcompress.methods.decoder.base import LayerMethod, LayerReducer
from vlmcompress.methods.decoder.editing import AttentionEditor
from vlmcompress.methods.tower.base import TowerReducer

#: Keys of a row and what stands above them.
COLUMNS: Mapping[str, str] = {
    "name": "method",
    "stage": "stage",
    "evidence": "evidence",
    "text_aware": "text-aware",
    "count_kind": "count kind",
    "training_free": "training-free",
    "paper": "paper",
    "parity": "parity",
}
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"

_SPACES = {"none": "", "tower": "features (tower)", "llm": "features (LLM)"}
_INSIDE = {
    "nothing": "",
    "previous": "attention of the layers before its sites",
    "own": "attention of its layers",
    "next": "queries and keys of the layers behind its sites",
    "features": "features around the layers before its sites",
}


def rows(names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """One dict per method, keyed by `COLUMNS`: texts, truth values, and a list of parity cases.

    Args:
        names: methods in the order wanted; every registered one, sorted, when not given.
    """
    return [_row(name) for name in (registry.names() if names is None else names)]


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as texts, in the order of `COLUMNS`."""
    shown = {
        **row,
        "text_aware": _yes(row["text_aware"]),
        "training_free": _yes(row["training_free"]),
        "parity": _braced(row["parity"]) or "none",
    }
    return [str(shown[key]) for key in COLUMNS]


def markdown(names: Iterable[str] | None = None) -> str:
    """The rows as a Markdown table; papers are linked, names set as code."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    for row in rows(names):
        parity = f"`{_braced(row['parity'])}`" if row["parity"] else "none"
        name, *between, _, _ = cells(row)
        lines.append([f"`{name}`", *between, _link(row["paper"]), parity])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@cache
def parity_cases() -> Mapping[str, Sequence[str]]:
    """Parity cases of each method, from the file that `python -m tests.parity` writes."""
    text = files(__package__).joinpath("parity.json").read_text(encoding="utf-8")
    cases: dict[str, list[str]] = json.loads(text)
    return cases


def insert(document: str) -> str:
    """`document` with the table of built-in methods between the markers.

    Raises:
        ValueError: when a marker is missing.
    """
    if BEGIN not in document or END not in document:
        raise ValueError(f"The document needs the markers {BEGIN} and {END}.")
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{markdown(registry.BUILTIN)}\n{END}{tail}"


def _row(name: str) -> dict[str, Any]:
    method = registry.get(name)()
    # A published name belongs to one method; its other place is told by the suffix.
    cases = parity_cases().get(name.removesuffix("_tower").removesuffix("_llm"), ())
    return {
        "name": name,
        "stage": method.stage,
        "evidence": _looks_at(method),
        "text_aware": _text_aware(method),
        "count_kind": method.count_kind,
        "training_free": method.training_free,
        "paper": method.paper,
        "parity": list(cases) if name in registry.BUILTIN else [],
    }


def _text_aware(method: Method) -> bool:
    """Whether the question decides: by its words, or by rows of the LLM that have read it."""
    if isinstance(method, AttentionEditor):
        return True
    if isinstance(method, LayerReducer):
        return method.reads in ("previous", "own", "next")
    return method.needs().asks


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _braced(cases: Sequence[str]) -> str:
    """Names of cases as a shell would write them: `tome_{cls,max}`."""
    if len(cases) < 2:
        return "".join(cases)
    words = zip(*(case.split("_") for case in cases), strict=False)
    stem = "_".join(same[0] for same in takewhile(lambda same: len(set(same)) == 1, words))
    return f"{stem}_{{{','.join(case.removeprefix(f'{stem}_') for case in cases)}}}"


def _looks_at(method: Method) -> str:
    needs = method.needs()
    parts = [
        _layers("[CLS] attention", needs.cls_attention),
        _layers("received attention", needs.received_attention),
        _layers("keys", needs.keys),
        _layers("[CLS] attention of full width", needs.wide_cls_attention),
        _layers("states", needs.states),
        "text" if needs.text else "",
        "question (LLM)" if needs.question else "",
        _SPACES[method.reads] if isinstance(method, TokenCompressor) else "",
        _in_blocks(method) if isinstance(method, TowerReducer) else "",
        *(_in_layers(method) if isinstance(method, LayerMethod) else ()),
    ]
    return "; ".join(filter(None, parts)) or "places only"


def _in_blocks(method: TowerReducer) -> str:
    what = " and ".join(sorted(method.looks_at)) or "features"
    return f"{what} of the blocks that reduce"


def _in_layers(method: LayerMethod) -> tuple[str, str]:
    if not isinstance(method, LayerReducer):
        return method.looks_at, ""
    return _INSIDE[method.reads], "embeddings" if method.reads_embedded else ""


def _layers(what: str, layers: tuple[Layer, ...]) -> str:
    if not layers:
        return ""
    numbers = ", ".join(f"{layer:.3g}" for layer in layers)
    return f"{what}, layer{'s' if len(layers) > 1 else ''} {numbers}"


def _link(paper: str) -> str:
    if not paper:
        return "baseline"
    _, arxiv, identifier = paper.partition("arxiv.org/abs/")
    return f"[arXiv {identifier}]({paper})" if arxiv else f"[link]({paper})"


if __name__ == "__main__":
    print(markdown(registry.BUILTIN))
