"""The table of methods, made from the classes: for the documentation and the command line."""

from __future__ import annotations

from collections.abc import Iterable

from vlmcompress.methods import registry
from vlmcompress.methods.base import Layer, Method, TokenCompressor
from vlmcompress.methods.tower.base import TowerReducer

COLUMNS = ("name", "stage", "looks at", "text-aware", "count", "training-free", "paper")
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"

_SPACES = {"none": "", "tower": "features (tower)", "llm": "features (LLM)"}


def rows(names: Iterable[str] | None = None) -> list[dict[str, str]]:
    """One dict per method, keyed by `COLUMNS`.

    Args:
        names: methods in the order wanted; every registered one, sorted, when not given.
    """
    return [_row(name) for name in (registry.names() if names is None else names)]


def markdown(names: Iterable[str] | None = None) -> str:
    """The rows as a Markdown table; papers are linked, names set as code."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for row in rows(names):
        shown = {**row, "name": f"`{row['name']}`", "paper": _link(row["paper"])}
        lines.append(tuple(shown[column] for column in COLUMNS))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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


def _row(name: str) -> dict[str, str]:
    method = registry.get(name)()
    yes_no = ("no", "yes")
    return {
        "name": name,
        "stage": method.stage,
        "looks at": _looks_at(method),
        "text-aware": yes_no[method.needs().text],
        "count": method.count_kind.replace("_", " "),
        "training-free": yes_no[method.training_free],
        "paper": method.paper,
    }


def _looks_at(method: Method) -> str:
    needs = method.needs()
    parts = [
        _layers("[CLS] attention", needs.cls_attention),
        _layers("received attention", needs.received_attention),
        _layers("keys", needs.keys),
        _layers("[CLS] attention of full width", needs.wide_cls_attention),
        "text" if needs.text else "",
        _SPACES[method.reads] if isinstance(method, TokenCompressor) else "",
        _in_blocks(method) if isinstance(method, TowerReducer) else "",
    ]
    return "; ".join(filter(None, parts)) or "places only"


def _in_blocks(method: TowerReducer) -> str:
    what = " and ".join(sorted(method.looks_at)) or "features"
    return f"{what} of the blocks that reduce"


def _layers(what: str, layers: tuple[Layer, ...]) -> str:
    if not layers:
        return ""
    return f"{what}, layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _link(paper: str) -> str:
    if not paper:
        return "baseline"
    _, arxiv, identifier = paper.partition("arxiv.org/abs/")
    return f"[arXiv {identifier}]({paper})" if arxiv else f"[link]({paper})"


if __name__ == "__main__":
    print(markdown(registry.BUILTIN))
