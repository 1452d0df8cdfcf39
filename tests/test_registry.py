"""Names, third-party methods, and the table in the documentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tests.methods_list import (
    ADAPTIVE_LAYER_METHODS,
    BESIDE_METHODS,
    CONNECTOR_METHODS,
    EXIT_TOWER_METHODS,
    LAYER_METHODS,
    PROMPT_METHODS,
    SPARSE_TOWER_METHODS,
    TOWER_METHODS,
    TRAINED_METHODS,
)
from vlmcompress.core.errors import ConfigError, UnknownMethodError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods import TokenCompressor, create, get, names, registry, table

DOCS = Path(__file__).parents[1] / "docs" / "methods.md"


def test_every_method_is_in_the_test_list():
    tower = TOWER_METHODS + SPARSE_TOWER_METHODS + EXIT_TOWER_METHODS
    layer = LAYER_METHODS + ADAPTIVE_LAYER_METHODS + BESIDE_METHODS
    connector = CONNECTOR_METHODS + TRAINED_METHODS
    stages = {"connector": connector, "tower": tower, "decoder": layer, "prompt": PROMPT_METHODS}
    for stage, methods in stages.items():
        listed = [name for name, _ in methods]
        assert len(set(listed)) == len(listed)
        assert set(listed) == {n for n in registry.BUILTIN if get(n).stage == stage}


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_every_method_is_documented(name: str):
    document = DOCS.read_text()
    assert f"| `{name}` |" in document
    assert f"**`{name}`**" in document
    assert name.isidentifier()
    assert name == name.lower()
    assert get(name).name == name


def test_documented_table_is_current():
    document = DOCS.read_text()
    assert table.insert(document) == document, "run: python -m vlmcompress.methods.table"
    with pytest.raises(ValueError, match="markers"):
        table.insert("no markers")


def test_table_rows():
    rows = {row["name"]: row for row in table.rows()}
    assert set(rows) == set(names())
    assert all(list(row) == list(table.COLUMNS) for row in rows.values())
    assert rows["vtc_cls"]["evidence"] == "[CLS] attention, layers -4, -3, -2"
    assert rows["vscan"]["evidence"].startswith("[CLS] attention, layers 0.208, -2")
    assert rows["divprune"]["evidence"] == "features (LLM)"
    assert rows["random"]["evidence"] == "places only"
    assert rows["cdpruner"]["text_aware"]
    assert not rows["random"]["text_aware"]


def test_table_says_which_original_results_are_met():
    rows = {row["name"]: row for row in table.rows()}
    assert rows["fastervlm"]["parity"] == ["fastervlm_a", "fastervlm_b"]
    assert rows["random"]["parity"] == []
    assert rows["tome"]["parity"] == rows["tome_tower"]["parity"]
    assert rows["received_attention"]["parity"] == []  # its paper's code does another thing
    assert table.cells(rows["ats"])[-1] == "ats_a"
    assert table.cells(rows["fastervlm"])[-1] == "fastervlm_{a,b}"
    assert table.cells(rows["uniform"])[-3:] == ["yes", "", "none"]


def test_unknown_method():
    with pytest.raises(UnknownMethodError, match="Did you mean 'fastervlm'"):
        create("fastvlm")
    with pytest.raises(ConfigError, match=r"Known methods: .*vtc_cls"):
        get("???")


def test_unknown_option():
    with pytest.raises(ConfigError, match="no option depth; its options: layer"):
        create("fastervlm", depth=3)
    with pytest.raises(ConfigError, match="its options: none"):
        create("uniform", seed=3)


@dataclasses.dataclass(frozen=True)
class Everything(TokenCompressor):
    """A third party's method."""

    name = "everything"

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep all."""
        return tokens


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    points = [
        EntryPoint(name, f"{__name__}:{target}", registry.ENTRY_POINT_GROUP)
        for name, target in (("everything", "Everything"), ("wrong", "DOCS"), ("random", "DOCS"))
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry._external.cache_clear()
    yield
    registry._external.cache_clear()


@pytest.mark.usefixtures("third_party")
def test_third_party_methods():
    assert "everything" in names()
    assert isinstance(create("everything"), Everything)
    assert table.rows(["everything"])[0]["paper"] == ""
    assert get("random").__module__ == "vlmcompress.methods.connector.random"
    with pytest.raises(ConfigError, match="must be a subclass"):
        get("wrong")
