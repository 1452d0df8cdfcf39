"""What the outcome of a cell depends on, as a hash.

A method depends on its own file, on every file of the library that this imports, on those that
`patch` imports, and on all of `live/`, `core/` and `families/`; not on the other methods. So a
change in `live/` or `core/` makes all results old, a change in one method's file only its own.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import transformers

from tests.seam import matrix
from tests.tiny import configs
from vlmcompress.methods.registry import BUILTIN

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vlmcompress"
#: Parts of it whose files are all counted, imported or not.
SHARED = ("core", "live", "families")
#: Parts that no cell runs, though what it runs imports them where it is asked to load something.
APART = frozenset({"hub", "integrations"})
#: What runs the cells, whose imports are followed. The lists (methods, families, exemptions) go in
#: entry by entry instead, with what `matrix.py` makes of them.
JUDGE = "tests/seam/checks.py"
LISTS = ("tests/seam/matrix.py", "tests/methods_list.py", "tests/tiny/configs.py")


def versions() -> dict[str, str]:
    """Versions on which outcomes depend."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
    }


@cache
def of_pair(method: str, family: str) -> str:
    """The fingerprint of all cells of a method on a family."""
    return digest(
        versions(),
        [matrix.POSITIONS, matrix.BUDGETS[matrix.stage_of(method)]],
        [meaning(path) for path in judges()],
        [meaning(path) for path in sources(method)],
        [method, BUILTIN[method], repr(matrix.configured(method))],
        [family, configs.CONFIGS[family]().to_dict()],
    )


def of_lists() -> str:
    """The fingerprint of the lists: methods, families, axes, equalities, cells and exemptions."""
    return digest(
        {name: repr(matrix.configured(name)) for name in sorted(matrix.names())},
        sorted(configs.CONFIGS),
        [matrix.KERNELS, matrix.DTYPES, matrix.POSITIONS, matrix.BUDGETS],
        [matrix.EQUALITIES, matrix.ONCE_PER_FAMILY, matrix.PLAIN],
        {name: matrix.chosen_families(name) for name in sorted(matrix.names())},
        [repr(exemption) for exemption in matrix.EXEMPT],
    )


def digest(*parts: object) -> str:
    """Twelve hexadecimal digits for anything that is JSON."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def sources(method: str) -> tuple[Path, ...]:
    """Files of the library that a method's cells can run, sorted."""
    shared = (path for name in SHARED for path in (ROOT / PACKAGE / name).glob("*.py"))
    roots = [BUILTIN[method].partition(":")[0], f"{PACKAGE}.live.patch"]
    found: set[Path] = set()
    waiting = [*shared, *(path for root in roots for path in files_of(root))]
    while waiting:
        path = waiting.pop()
        if path not in found and not APART.intersection(path.relative_to(ROOT).parts):
            found.add(path)
            waiting += [file for name in imported(path) for file in files_of(name)]
    return tuple(sorted(found))


@cache
def judges() -> tuple[Path, ...]:
    """Files of the tests that a cell runs, without the lists, sorted."""
    lists = {ROOT / name for name in LISTS}
    found, waiting = set[Path](), [ROOT / JUDGE]
    while waiting:
        path = waiting.pop()
        if path not in found | lists:
            found.add(path)
            waiting += [file for name in imported(path) for file in files_of(name, "tests")]
    return tuple(sorted(found))


def files_of(name: str, package: str = PACKAGE) -> list[Path]:
    """Files of a dotted name in a package: modules and packages on the way; [] of other names."""
    parts = name.split(".")
    if parts[0] != package:
        return []
    places = [ROOT.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    candidates = [file for p in places for file in (p / "__init__.py", p.with_suffix(".py"))]
    return [path for path in candidates if path.is_file()]


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Names of modules, and of what may be modules, that a file imports anywhere."""
    return tuple(_imported(_tree(path)))


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def meaning(path: Path) -> str:
    """A digest of a file without comments, layout and the registry's list.

    Of that list a cell has one entry.
    """
    tree = _tree(path)
    tree.body = [node for node in tree.body if not _is_list_of_methods(node)]
    return digest(ast.dump(tree))


def _is_list_of_methods(node: ast.stmt) -> bool:
    target = node.target if isinstance(node, ast.AnnAssign) else None
    return isinstance(target, ast.Name) and target.id == "BUILTIN"


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
