"""The site: it builds without a warning, and everything in it leads somewhere."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.pages import PAGES
from tests.project import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@cache
def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _leads_nowhere(page: Path, address: str) -> bool:
    path, _, anchor = html.unescape(address).partition("#")
    target = page.parent / unquote(path.partition("?")[0]) if path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.exists():
        return True
    return bool(anchor) and f'id="{html.escape(unquote(anchor))}"' not in _text(target)


def test_links_and_pictures_lead_somewhere(site):
    """Pictures in raw HTML too, which mkdocs does not look at."""
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    addresses = {page: re.findall(r'(?:href|src)="([^"]+)"', _text(page)) for page in pages}
    local = [
        (page, address)
        for page, found in addresses.items()
        for address in found
        if not re.match(r"[a-z]+:|//", address)
    ]
    assert len(local) > len(pages)
    assert not [(p.relative_to(site), a) for p, a in local if _leads_nowhere(p, a)]


def test_nothing_is_fetched_from_elsewhere(site):
    loaded = re.compile(r'<(?:script|img|link)[^>]+(?:src|href)="(?:https?:)?//')
    assert not [page for page in site.rglob("*.html") if loaded.search(_text(page))]


def test_every_page_is_there(site):
    built = {_text(page).count("<article") for page in site.rglob("index.html")}
    assert built == {1}
    assert len(list(site.rglob("index.html"))) == len(PAGES)


def test_the_reference_is_made_of_docstrings(site):
    page = _text(site / "api" / "patch" / "index.html")
    assert "Compress the visual tokens of" in page
    assert 'id="vlmcompress.Handle.overlay"' in page
