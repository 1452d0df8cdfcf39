"""Headless Chromium: pages as pictures, and where their parts lie."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_WIDTH = 1100
_MARK = "measured-boxes"
_MEASURE = f"""<script>
addEventListener("load", () => {{
  const boxes = [...document.querySelectorAll("figure.plot svg, article img")].map(part => {{
    const box = part.getBoundingClientRect();
    return {{kind: part.closest("[data-kind]")?.dataset.kind ?? "picture",
      loaded: part.tagName !== "IMG" || (part.complete && part.naturalWidth > 0),
      box: [box.left, box.top, box.right, box.bottom]}};
  }});
  const told = document.createElement("pre");
  told.id = "{_MARK}";
  told.hidden = true;
  told.textContent = JSON.stringify({{boxes, height: document.documentElement.scrollHeight}});
  document.body.append(told);
}});
</script>"""


def chromium() -> str:
    """The browser; skips where there is none, or fails under REQUIRE_CHROMIUM=1."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        why = f"no headless browser is installed (looked for {', '.join(_NAMES)})"
        if os.environ.get("REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"{why}; `apt-get install chromium` brings one.")
        pytest.skip(why)
    return found


def measured(page: Path, folder: Path) -> dict[str, Any]:
    """`boxes` of the plots and pictures of a page, and its `height`, in pixels."""
    copy = folder / "measured.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"{_MEASURE}</body>"), encoding="utf-8")
    dom = _run(folder, "--dump-dom", copy.as_uri()).stdout
    told = re.search(rf'<pre id="{_MARK}"[^>]*>(.*?)</pre>', dom, re.DOTALL)
    assert told, "the page's scripts did not run"
    return json.loads(html.unescape(told[1]))


def screenshot(page: Path, height: int, folder: Path) -> Path:
    """A PNG of the whole page."""
    shot = folder / "page.png"
    size = f"--window-size={_WIDTH},{height}"
    _run(folder, f"--screenshot={shot}", size, "--hide-scrollbars", page.as_uri())
    return shot


def _run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # Containers have neither the user namespaces of the sandbox nor a large /dev/shm.
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    profile = f"--user-data-dir={folder / 'profile'}"
    size = () if any("window-size" in o for o in options) else (f"--window-size={_WIDTH},900",)
    return subprocess.run(
        [chromium(), *fixed, profile, "--hide-scrollbars", *size, *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
