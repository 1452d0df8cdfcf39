"""What pages point at exists: files, commands with their options, make targets, public names."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
import typer.main

from tests.docs.pages import PAGES, blocks, local_links, read
from tests.project import ROOT
from vlmcompress.cli import app

#: Modules whose `__all__` is public (docs/versioning.md).
PUBLIC = (
    *("vlmcompress", "vlmcompress.hub", "vlmcompress.methods", "vlmcompress.reference"),
    "eval_harness",
)
_ITEM = re.compile(r" *([-*]|\d+\.) ")
every_page = pytest.mark.parametrize("page", PAGES)


@every_page
def test_links_and_pictures_exist(page):
    assert not [str(target) for target in local_links(page) if not target.exists()]


@every_page
def test_lists_stand_apart(page):
    """GitHub begins a list anywhere, the site behind an empty line or another item only."""
    body = re.sub(r"\A---\n.*?^---$", "", read(page), flags=re.S | re.M)  # front matter
    text = re.sub(r"^( *)```.*?^\1```", "", body, flags=re.S | re.M)
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip("\n").splitlines()
        items = [bool(_ITEM.match(line)) for line in lines]
        assert not any(items) or items[0], lines[items.index(True)]


def _options(words: list[str]) -> set[str] | None:
    """Options of the command that a line calls, None where there is no such command."""
    command = typer.main.get_command(app)
    for word in words:
        if not hasattr(command, "commands"):
            break
        if word.startswith("-"):
            break
        if word not in command.commands:
            return None
        command = command.commands[word]
    return {"--help", *(name for p in command.params for name in (*p.opts, *p.secondary_opts))}


@every_page
def test_commands_and_their_options_exist(page):
    lines = "\n".join(blocks(page, "sh")).splitlines()
    inline = re.findall(r"`(vlmcompress [a-z][^`\n]*)`", read(page))
    for line in [*(line for line in lines if line.startswith("vlmcompress ")), *inline]:
        words = re.sub(r"\"[^\"]*\"|\s#.*", "", line).split()[1:]
        if words[0].isupper():  # COMMAND
            continue
        known = _options(words)
        assert known is not None, line
        assert {word for word in words if word.startswith("--")} <= known, line


@every_page
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shell = re.findall(r"^make ([a-z][a-z-]*)", "\n".join(blocks(page, "sh")), flags=re.M)
    for target in [*shell, *re.findall(r"`make ([a-z][a-z-]*)", read(page))]:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module):
    reference = "".join(read(page) for page in PAGES if page.startswith("docs/api/"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", reference, re.M)}
    documented |= set(re.findall(r"`(?:[a-z_]+\.)*(\w+)`", reference))
    errors = {name for name in vars(import_module("vlmcompress.core.errors")) if "Error" in name}
    assert set(import_module(module).__all__) - errors <= documented
