"""The page about adapters speaks of everything that is public."""

from __future__ import annotations

from tests.docs.pages import read
from vlmcompress import hub


def test_every_public_name_is_on_the_page():
    page = read("docs/adapters.md")
    spoken_of = {name for name in hub.__all__ if f"hub.{name}" in page}
    behind = {"About", "learned", "save_learned"}  # of write_card and of from_pretrained
    assert spoken_of | behind == set(hub.__all__)
