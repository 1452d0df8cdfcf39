"""The wheel holds what a fresh environment needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "vlmcompress" / "reference" / "weights"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built without a network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


LIMIT = 20 * 2**20


@pytest.mark.slow
def test_the_wheel_is_small(wheel):
    assert Path(wheel.filename).stat().st_size <= LIMIT


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone(wheel, tmp_path):
    """The wheel unpacked elsewhere, beside the installed dependencies; no checkout in sight."""
    wheel.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vlmcompress.cli"]
    where = "import vlmcompress; print(vlmcompress.__file__)"
    asked = subprocess.run(
        [sys.executable, "-c", where],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.startswith(str(tmp_path))
    done = subprocess.run(
        [*command, "demo", "--quick", "--json", "--out", "demo"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(done.stdout)
    assert (
        results["accuracy"]["0.1"]["vtc_cls"]["low"] > results["accuracy"]["0.1"]["random"]["high"]
    )
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {
        "kept.png",
        "curve.png",
        "results.json",
    }


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.mark.slow
def test_packages_and_types_are_in(wheel):
    names = set(wheel.namelist())
    assert {"vlmcompress/__init__.py", "vlmcompress/py.typed", "eval_harness/__init__.py"} <= names
    roots = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == {"vlmcompress", "eval_harness"}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("vlmcompress", "eval_harness")
        for path in (ROOT / package).rglob("*.py")
    }
    assert sources <= names


@pytest.mark.slow
def test_weights_are_in(wheel):
    files = {path.relative_to(ROOT).as_posix() for path in WEIGHTS.rglob("*") if path.is_file()}
    assert files <= set(wheel.namelist())
    assert any(name.endswith(".safetensors") for name in files)


@pytest.mark.slow
def test_the_command_is_installed(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "vlmcompress = vlmcompress.cli:app" in wheel.read(name).decode()


@pytest.mark.slow
def test_metadata(metadata):
    import vlmcompress

    assert metadata["Name"] == "vlmcompress"
    assert metadata["Version"] == vlmcompress.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


@pytest.mark.slow
def test_nothing_is_pinned_to_an_old_version(metadata):
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert not [r for r in required if "==" in r or "<" in r]
    assert {"torch", "transformers"} <= {r.split(">")[0].strip() for r in required}


@pytest.mark.slow
def test_named_extras_exist(metadata):
    extras = set(metadata.get_all("Provides-Extra"))
    assert {"train", "clip", "eval", "lmms", "vllm", "vq", "docs", "dev"} <= extras
