"""Optional packages: never imported by the way, and named by their extra when missing."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from eval_harness import plots, statistics
from tests.project import ROOT, extras, names, project
from vlmcompress.core.errors import MissingExtraError
from vlmcompress.core.extras import EXTRA_OF, require

OWN = ("vlmcompress", "eval_harness")
FILES = sorted(path for package in OWN for path in (ROOT / package).rglob("*.py"))

#: Extras' packages that no code here imports: transformers does when a user asks it to.
THROUGH_TRANSFORMERS = {
    "accelerate": "device_map",
}

#: Code that runs inside other programs alone, which are there then, and what it imports of them;
#: and that which looks for Ray, whose name is that of a module of this library, too.
HOSTS = {
    "vlmcompress/integrations/cluster.py": {"ray"},
    "vlmcompress/integrations/lmms_eval/": {"accelerate", "lmms_eval"},
    "vlmcompress/integrations/vllm/": {"vllm"},
    "eval_harness/served/": {"openai", "vllm"},
}

#: Import names that differ from the distribution's.
DISTRIBUTION_OF = {
    "PIL": "pillow",
    "open_clip": "open_clip_torch",
    "vector_quantize_pytorch": "vector-quantize-pytorch",
    "yaml": "pyyaml",
}
IMPORT_OF = {distribution: package for package, distribution in DISTRIBUTION_OF.items()}
CORE = {IMPORT_OF.get(name, name) for name in names(project()["dependencies"])} - set(EXTRA_OF)


def _imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and package of every absolute import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]


def _required(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls of the helper."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("require"):
            yield node


def _at_import(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls of the helper outside functions."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {id(c) for f in ast.walk(tree) if isinstance(f, functions) for c in _required(f)}
    return (call for call in _required(tree) if id(call) not in inside)


def _tree(path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


@every_file
def test_optional_packages_are_imported_through_the_helper(path):
    name = path.relative_to(ROOT).as_posix()
    hosts = (packages for folder, packages in HOSTS.items() if name.startswith(folder))
    allowed = {*sys.stdlib_module_names, *OWN, *CORE}.union(*hosts)
    wrong = [(line, package) for line, package in _imported(_tree(path)) if package not in allowed]
    assert not wrong, "neither a dependency of pyproject.toml nor imported by core.extras.require"


@every_file
def test_optional_packages_are_imported_when_used(path):
    assert not [call.lineno for call in _at_import(_tree(path))]


@pytest.mark.parametrize(
    ("code", "package"), [("import scipy.stats", "scipy"), ("from peft import x", "peft")]
)
def test_the_search_for_imports_finds_them(code, package):
    nested = f"def f():\n    {code}"
    assert [found for _, found in _imported(ast.parse(nested))] == [package]
    assert list(_at_import(ast.parse("x = require('scipy')\ndef f():\n    require('scipy')")))


def test_the_table_is_what_the_code_asks_for():
    asked = {
        ast.literal_eval(call.args[0]).partition(".")[0]
        for path in FILES
        for call in _required(_tree(path))
    }
    assert asked == set(EXTRA_OF)


def test_every_extra_brings_its_packages():
    """And nothing that no code uses."""
    listed = {(extra, package) for extra, packages in extras().items() for package in packages}
    used = {(extra, DISTRIBUTION_OF.get(name, name)) for name, extra in EXTRA_OF.items()}
    assert used <= listed
    through_others = {*THROUGH_TRANSFORMERS, "lmms-eval", "ray", "vllm"}
    assert {package for _, package in listed - used} == through_others


def test_the_names_of_distributions_are_right():
    found = importlib.metadata.packages_distributions()
    for package in (*EXTRA_OF, *CORE):
        named = {name.lower() for name in found[package]}
        assert DISTRIBUTION_OF.get(package, package) in named


@pytest.mark.parametrize("package", EXTRA_OF)
def test_a_missing_package_names_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for module in (package, f"{package}.inner"):
        with pytest.raises(MissingExtraError) as raised:
            require(module)
        assert repr(package) in str(raised.value)
        assert f'pip install "vlmcompress[{EXTRA_OF[package]}]"' in str(raised.value)


def _draw(folder):
    plots.plot_curve({"accuracy": {}, "blind": 0.0, "n": 0}, folder / "curve.png")


def _count(_folder):
    statistics.proportion(1, 2)


def _contrast(_folder):
    """The loss of a batch without scenes: what it needs is imported before anything is counted."""
    from vlmcompress.reference import text_head

    nothing = torch.zeros(0, 1)
    text_head.contrastive_loss(None, None, nothing, nothing, [], nothing, None)


@pytest.mark.parametrize(
    ("package", "use"), [("matplotlib", _draw), ("scipy", _count), ("open_clip", _contrast)]
)
def test_features_say_what_they_miss(package, use, monkeypatch, tmp_path):
    assert package in EXTRA_OF
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=rf"vlmcompress\[{EXTRA_OF[package]}\]"):
        use(tmp_path)


def test_a_package_that_is_there_and_broken_is_no_missing_one(monkeypatch, tmp_path):
    (tmp_path / "scipy.py").write_text("import no_such_dependency", encoding="utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as raised:
        require("scipy")
    assert not isinstance(raised.value, MissingExtraError)
    sys.modules.pop("scipy", None)


def test_importing_patch_imports_no_optional_package():
    """Nor transformers, whose generation alone takes longer to load than all of this library."""
    heavy = {"transformers", *EXTRA_OF, *THROUGH_TRANSFORMERS}
    code = f"import sys; from vlmcompress import patch; print(*{heavy!r} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
