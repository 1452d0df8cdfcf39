"""What is published: its contents, and that it works where nothing but its dependencies is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vlmcompress
from tests.project import FOR_DEVELOPERS, ROOT, extras, project

WEIGHTS = ROOT / "vlmcompress" / "reference" / "weights"
PACKAGES = ("vlmcompress", "eval_harness")
LIMIT = 20 * 2**20

#: Suffixes of what belongs into the packages; the empty one is of LICENSE, METADATA and the like.
SUFFIXES = {".jinja", ".json", ".md", ".py", ".safetensors", ".txt", ".typed", ".yaml", ""}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder with the sdist of this tree and the wheel built from that sdist, as published."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def wheel(dist):
    (built,) = dist.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def sdist(dist):
    """Names in the sdist, without its own folder."""
    (built,) = dist.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def clean(dist, tmp_path_factory):
    """Run a command in an environment that has the wheel, the dependencies and no checkout.

    The dependencies are those of the running interpreter: a path in a `.pth` file makes them
    importable, and the editable installation beside them stays without effect, since `.pth` files
    of such a path are not read.
    """
    home, (built,) = tmp_path_factory.mktemp("clean"), dist.glob("*.whl")
    venv.create(home / "env", with_pip=False)
    binaries = home / "env" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(built)], check=True)
    (site,) = home.glob("env/lib/*/site-packages")
    own = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(own) + "\n", encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(command, *arguments):
        done = subprocess.run(
            [str(binaries / command), *arguments],
            env={**environment, "HF_HUB_OFFLINE": "1"},
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.home = home
    return run


def _sources() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }


def test_wheel_and_sdist_are_small(dist):
    sizes = {path.name: path.stat().st_size for path in dist.iterdir()}
    assert len(sizes) == 2
    assert max(sizes.values()) <= LIMIT, sizes


def test_the_index_would_take_both(dist):
    files = map(str, dist.iterdir())
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_packages_and_types_are_in(wheel):
    names = set(wheel.namelist())
    assert {"vlmcompress/__init__.py", "vlmcompress/py.typed", "eval_harness/__init__.py"} <= names
    assert _sources() <= names


def test_nothing_else_is_in_the_wheel(wheel):
    names = wheel.namelist()
    inside = f"vlmcompress-{vlmcompress.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, inside}
    assert {Path(name).suffix for name in names} <= SUFFIXES


def test_weights_are_in(wheel):
    files = {path.relative_to(ROOT).as_posix() for path in WEIGHTS.rglob("*") if path.is_file()}
    assert files <= set(wheel.namelist())
    assert any(name.endswith(".safetensors") for name in files)


def test_the_sdist_holds_the_packages_and_their_papers(sdist):
    papers = {"CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md", "pyproject.toml"}
    assert _sources() | papers <= sdist
    top = {name.partition("/")[0] for name in sdist if name}
    assert top <= {*PACKAGES, *papers, "PKG-INFO", ".gitignore"}


def test_the_command_is_installed(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "vlmcompress = vlmcompress.cli:app" in wheel.read(name).decode()


def test_metadata(metadata):
    assert metadata["Name"] == "vlmcompress"
    assert metadata["Version"] == vlmcompress.__version__
    assert metadata["Summary"] == project()["description"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Keywords"]
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.10"} <= set(
        metadata.get_all("Classifier")
    )


def test_nothing_is_pinned_to_an_old_version(metadata):
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    core = [one for one in required if "extra" not in str(one.marker)]
    assert not [str(one) for one in core for bound in one.specifier if bound.operator != ">="]
    assert {"torch", "transformers"} <= {one.name for one in core}


def test_extras_are_in(metadata):
    assert set(metadata.get_all("Provides-Extra")) == {*extras(), *FOR_DEVELOPERS}


def test_the_clean_environment_has_no_checkout(clean):
    files = "vlmcompress.__file__, eval_harness.__file__"
    show = f"import sys, vlmcompress, eval_harness; print({files}, *sys.path, sep='\\n')"
    library, harness, *path = clean("python", "-c", show).splitlines()
    assert library.startswith(str(clean.home))
    assert harness.startswith(str(clean.home))
    assert str(ROOT) not in path


def test_the_demo_runs_from_the_wheel_alone(clean):
    results = json.loads(clean("vlmcompress", "demo", "--quick", "--json", "--out", "demo"))
    few = results["accuracy"]["0.1"]
    assert few["vtc_cls"]["low"] > few["random"]["mean"]
    written = {path.name for path in (clean.home / "demo").iterdir()}
    assert written == {"kept.png", "curve.png", "results.json"}


def test_other_commands_run_from_the_wheel_alone(clean):
    assert clean("vlmcompress", "--version").strip() == vlmcompress.__version__
    assert "vtc_cls" in clean("vlmcompress", "methods")
    assert "llava" in clean("vlmcompress", "doctor")
