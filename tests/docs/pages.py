"""Pages of the documentation and what stands in them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from tests.project import ROOT

#: Every page, by its path from the root of the repository.
PAGES: tuple[str, ...] = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "tests/parity/README.md",
    "vlmcompress/reference/weights/README.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "adapters").rglob("README.md")),
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")),
)


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Code of one language on a page, in its order; indented blocks too."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", read(page), flags=re.S | re.M)
    return [textwrap.dedent(code) for _, code in found]


def local_links(page: str) -> list[Path]:
    """Where links and pictures of a page lead inside the repository."""
    text = re.sub(r"^( *)```.*?^\1```", "", read(page), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text)
    return [(ROOT / page).parent / target for target in targets if ":" not in target]
