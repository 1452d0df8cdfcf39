"""Rules about the code itself: where hooks may be, what is imported, how large files are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vlmcompress", "eval_harness")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

#: Files outside vlmcompress/live that may hook or replace a forward, and why.
HOOKS_ALLOWED = {
    "eval_harness/stages.py": "marks when parts begin and end, inside one `with`",
    "eval_harness/replay.py": "the tower returns its recorded output, inside one `with`",
    "vlmcompress/integrations/vllm/evidence.py": "an engine's tower cannot be patched",
    "eval_harness/towers.py": "what blocks are called with, noted in one pass and taken off again",
}
LONGEST = 400  # lines
FORBIDDEN_CALLS = {"torch.load", "pickle.load", "pickle.loads"}

every_file = pytest.mark.parametrize("name", NAMES)


def _tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def _is_hook(node: ast.AST) -> bool:
    """`x.register_..._hook(...)`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    name = node.func.attr
    return name.startswith("register_") and name.endswith(("_hook", "_hooks"))


def _is_replacement(node: ast.AST) -> bool:
    """`x.forward = ...`, `x.generate = ...`, `x.__dict__["forward"] = ...` or `setattr` of them."""
    replaced = {"forward", "generate"}
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(_names(target) & replaced for target in targets)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
        return any(isinstance(a, ast.Constant) and a.value in replaced for a in node.args[1:2])
    return False


def _names(target: ast.expr) -> set[object]:
    """Attribute or `__dict__` key that an assignment sets."""
    if isinstance(target, ast.Tuple):
        return set().union(*map(_names, target.elts))
    if isinstance(target, ast.Attribute):
        return {target.attr}
    of_dict = isinstance(target, ast.Subscript) and isinstance(target.value, ast.Attribute)
    if of_dict and target.value.attr == "__dict__" and isinstance(target.slice, ast.Constant):
        return {target.slice.value}
    return set()


def _offences(name: str) -> list[int]:
    return [n.lineno for n in ast.walk(_tree(name)) if _is_hook(n) or _is_replacement(n)]


@every_file
def test_hooks_are_put_on_in_live_only(name):
    if name.startswith("vlmcompress/live/") or name in HOOKS_ALLOWED:
        return
    assert not _offences(name), f"{name} hooks or replaces a method outside vlmcompress/live"


def test_allowed_hooks_are_used_and_have_a_reason():
    for name, reason in HOOKS_ALLOWED.items():
        assert reason
        assert _offences(name), f"{name} needs no exemption"


@pytest.mark.parametrize(
    "code",
    [
        "m.register_forward_hook(f)",
        "m.forward = f",
        "a, m.generate = f, g",
        "m.__dict__['forward'] = f",
        "setattr(m, 'forward', f)",
    ],
)
def test_the_search_for_hooks_finds_them(code):
    assert any(_is_hook(n) or _is_replacement(n) for n in ast.walk(ast.parse(code)))


def _public(tree: ast.Module) -> Iterator[ast.AST]:
    """Public classes and functions, and public methods of public classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                methods = (n for n in node.body if isinstance(n, kinds))
                yield from (n for n in methods if not n.name.startswith("_"))


def _has_docstring(node: ast.AST) -> bool:
    overload = any("overload" in ast.dump(d) for d in getattr(node, "decorator_list", ()))
    return overload or ast.get_docstring(node) is not None


@every_file
def test_everything_public_has_a_docstring(name):
    tree = _tree(name)
    missing = [node.name for node in _public(tree) if not _has_docstring(node)]
    assert not missing
    assert not tree.body or ast.get_docstring(tree)


@every_file
def test_files_are_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= LONGEST


@every_file
def test_nothing_is_unpickled_and_no_remote_code_is_trusted(name):
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Import):
            assert "pickle" not in {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module != "pickle"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS
            assert "trust_remote_code" not in {keyword.arg for keyword in node.keywords}


@every_file
def test_no_class_of_another_package_is_patched(name):
    """No attribute is set on an imported name, which would reach every model of a process."""
    tree = _tree(name)
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else []:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                assert target.value.id not in imported, ast.unparse(node)
