"""Continuous integration: what the workflows name is what pyproject.toml and the Makefile say."""

from __future__ import annotations

import re

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.project import ROOT, floor, project

FOLDER = ROOT / ".github" / "workflows"
NAMES = ("docs", "lint", "publish", "tests", "wheel")
PERMISSIONS = {"contents": "read"}


def _workflow(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yml").read_text(encoding="utf-8"))


def _steps(name: str) -> list[dict]:
    jobs = _workflow(name)["jobs"].values()
    return [step for job in jobs for step in job.get("steps", ())]


def _pythons() -> list[str]:
    """The versions in the classifiers, oldest first."""
    found = [re.fullmatch(r".* :: (3\.\d+)", line) for line in project()["classifiers"]]
    return sorted((m[1] for m in found if m), key=Version)


def test_every_workflow_is_known():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_workflows_are_complete(name):
    workflow = _workflow(name)
    assert workflow["name"] == name
    assert workflow[True]  # `on`, which is a boolean in YAML
    assert workflow["permissions"] == PERMISSIONS
    for job in workflow["jobs"].values():
        if "uses" in job:
            assert (ROOT / job["uses"]).exists()
            continue
        assert job["timeout-minutes"] <= 60
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "@" in step.get("uses", "@")


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    runs = " ".join(step.get("run", "") for step in _steps(name))
    for target in re.findall(r"\bmake ([a-z-]+)", runs):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


@pytest.mark.parametrize("name", ["docs", "lint", "tests", "wheel"])
def test_changes_are_checked_before_they_are_taken(name):
    assert {"push", "pull_request"} <= set(_workflow(name)[True])


def test_oldest_and_newest_versions_are_tested():
    rows = _workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    oldest, newest = ({row["name"]: row for row in rows}[name] for name in ("oldest", "newest"))
    (bound,) = Requirement(oldest["transformers"]).specifier
    assert bound.operator == "=="
    assert Version(bound.version) == floor("transformers")
    assert not Requirement(newest["transformers"]).specifier
    assert [oldest["python"], newest["python"]] == [_pythons()[0], _pythons()[-1]]


def test_the_wheel_is_installed_on_the_oldest_and_the_newest_python():
    pythons = _workflow("wheel")["jobs"]["install"]["strategy"]["matrix"]["python"]
    assert pythons == [_pythons()[0], _pythons()[-1]]


def test_classifiers_begin_at_the_oldest_python():
    assert SpecifierSet(f">={_pythons()[0]}") == SpecifierSet(project()["requires-python"])


def test_only_a_tested_wheel_is_published():
    workflow = _workflow("publish")
    assert set(workflow[True]) == {"release"}
    publish = workflow["jobs"]["publish"]
    needed = workflow["jobs"][publish["needs"]]["uses"]
    assert needed == "./.github/workflows/wheel.yml"
    assert _workflow("wheel")["jobs"]["install"]["needs"] == "build"
    assert any("test-wheel" in step.get("run", "") for step in _steps("wheel"))


def test_publishing_is_trusted_and_stores_no_token():
    publish = _workflow("publish")["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    everything = "".join((FOLDER / f"{name}.yml").read_text(encoding="utf-8") for name in NAMES)
    assert "secrets." not in everything
    assert "password" not in everything
    assert everything.count("id-token") == 1


def test_the_page_on_versions_names_the_same_windows():
    page = (ROOT / "docs" / "versioning.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", page, flags=re.M))
    assert rows.pop("Python") == _pythons()[0]
    assert set(rows) == {"torch", "transformers"}
    for name, oldest in rows.items():
        assert Version(oldest) == floor(name)
