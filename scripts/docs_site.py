"""Hook of mkdocs: the site has the layout of the repository, so that a link works on both.

mkdocs knows the files below docs/ by paths that begin there, and nothing outside. Here every file
goes by its path from the root of the repository, and README.md, CONTRIBUTING.md and whatever else
the navigation or a page points at comes along. Addresses of pages stay without the `docs/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"")
_CODE = re.compile(r"^( *)```.*?^\1```", flags=re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation with every page that a `*` stands for, by the name of its folder."""
    config.nav = _spread(config.nav)
    return config


def _spread(nav: Any) -> Any:
    if isinstance(nav, dict):
        return {title: _spread(entry) for title, entry in nav.items()}
    if isinstance(nav, list):
        return [_spread(entry) for entry in nav]
    if not isinstance(nav, str) or "*" not in nav:
        return nav
    pages = sorted(ROOT.glob(nav))
    return [{page.parent.name: page.relative_to(ROOT).as_posix()} for page in pages]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every file under its path in the repository, and those that are pointed at from outside."""
    docs = Path(config.docs_dir)
    found: dict[str, File] = {}
    for file in files:
        if file.src_dir != config.docs_dir:  # of the theme and of plugins
            found[file.src_uri] = file
            continue
        path = (docs / file.src_uri).relative_to(ROOT).as_posix()
        page = file.src_uri if file.is_documentation_page() else None
        found[path] = _file(path, config, address=page, inclusion=file.inclusion)
    waiting = [*_named(config.nav or []), *found]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = _file(path, config, address=_address(path))
        if found[path].is_documentation_page():
            waiting += [target for target in links(path) if target not in found]
    _refuse_twins(found.values())
    return Files(list(found.values()))


def links(path: str) -> list[str]:
    """Files of the repository that a page links to, as paths from the root."""
    text = _CODE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    targets = [link or picture for link, picture in _LINK.findall(text)]
    local = [target for target in targets if ":" not in target]
    places = [((ROOT / path).parent / target).resolve() for target in local]
    inside = [place for place in places if place.is_file() and place.is_relative_to(ROOT)]
    return [place.relative_to(ROOT).as_posix() for place in inside]


def _refuse_twins(files: Iterable[File]) -> None:
    """Two pages at one address: without `docs/` a page may meet one from outside.

    Raises:
        PluginError: naming both.
    """
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(file.dest_uri, file.src_uri)
        if other != file.src_uri:
            raise PluginError(f"{other} and {file.src_uri} both become {file.dest_uri}.")


def _named(nav: Any) -> Iterator[str]:
    """Pages that the navigation names."""
    if isinstance(nav, str):
        if "://" not in nav:
            yield nav
        return
    for entry in nav.values() if isinstance(nav, dict) else nav:
        yield from _named(entry)


def _address(path: str) -> str | None:
    """Of a folder's README whose address a page of docs/ has: below that page."""
    folder, _, name = path.rpartition("/")
    taken = name == "README.md" and (ROOT / "docs" / f"{folder}.md").is_file()
    return f"{folder}/overview.md" if taken else None


def _file(path: str, config: MkDocsConfig, *, address: str | None = None, **options: Any) -> File:
    """A file of the repository; `address` is the path that its page's address is made from."""
    file = File(path, str(ROOT), config.site_dir, config.use_directory_urls, **options)
    if address is not None:
        page = File(address, str(ROOT), config.site_dir, config.use_directory_urls)
        file.dest_uri = page.dest_uri
    return file
