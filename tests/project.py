"""What pyproject.toml says."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
#: Extras for work on the library itself.
FOR_DEVELOPERS = {"dev", "docs"}


@functools.cache
def project() -> dict[str, Any]:
    """The table `project`."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    """Distributions that requirements name."""
    return {Requirement(line).name for line in requirements}


def extras() -> dict[str, set[str]]:
    """Distributions of the extras meant for users."""
    found = project()["optional-dependencies"]
    return {extra: names(lines) for extra, lines in found.items() if extra not in FOR_DEVELOPERS}


def floor(distribution: str) -> Version:
    """The oldest version of a dependency that the library takes."""
    (wanted,) = (
        one for one in map(Requirement, project()["dependencies"]) if one.name == distribution
    )
    (bound,) = wanted.specifier
    return Version(bound.version)
