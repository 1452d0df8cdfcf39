"""Spaces: what a model can run, what files say, and files that say nothing of use."""

from __future__ import annotations

import pytest

from eval_harness.tune import space
from vlmcompress.core.errors import ConfigError, UnknownMethodError
from vlmcompress.doctor import Diagnosis, Verdict


def _diagnosis(*runs, default="vtc_cls"):
    verdicts = tuple(Verdict(name, True) for name in runs)
    return Diagnosis("llava", supported=True, default_method=default, methods=verdicts)


def test_the_default_space_holds_what_runs():
    found = space.default(_diagnosis("divprune", "vtc_cls", "fastv"))
    assert found[0] == "vtc_cls:0.75"
    assert "divprune:0.1 | fastv:0.5" in found
    named = {stage.split(":")[0] for spec in found for stage in spec.split(" | ")}
    assert named == {"divprune", "vtc_cls", "fastv"}
    assert len(found) == len(set(found)) == 2 * len(space.KEEPS) + 2 * len(space.COMBINED_KEEPS)


def test_the_models_default_method_comes_first():
    found = space.default(_diagnosis("received_attention", "pool", default="received_attention"))
    assert found[0] == "received_attention:0.75"
    assert "pool:0.05" in found


def test_a_model_that_runs_nothing():
    with pytest.raises(ConfigError, match="None of vtc_cls, divprune"):
        space.default(_diagnosis("fastv"))


def test_a_file(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "- tower: [null, 'tome_tower:0.5']\n"
        "  connector: [divprune, 'vtc_cls:64']\n"
        "  decoder: [null, 'fastv@2:0.5']\n"
        "  keeps: [0.25]\n"
        "- pipelines: ['divprune:0.25', 'pyramiddrop:0.25']\n",
        encoding="utf-8",
    )
    found = space.read(file)
    assert len(found) == 2 * 2 * 2 + 1  # divprune:0.25 is there already
    assert "tome_tower:0.5 | vtc_cls:64 | fastv@2:0.5" in found
    assert found[-1] == "pyramiddrop:0.25"


@pytest.mark.parametrize(
    ("grid", "error", "words"),
    [
        ({"conector": ["divprune"]}, ConfigError, "Did you mean 'connector'"),
        ({"connector": ["divprun"], "keeps": [0.1]}, UnknownMethodError, "divprune"),
        ({"connector": ["divprune"]}, ConfigError, "does not say how much it keeps"),
        ({"connector": ["divprune"], "keeps": [1.5]}, ConfigError, "1.5"),
        ({"pipelines": ["fastv@2:0.5 | divprune:0.1"]}, ConfigError, "fastv@2:0.5 | divprune"),
        ({"tower": [None]}, ConfigError, "no pipeline"),
        ({}, ConfigError, "no pipeline"),
        ("divprune:0.1", ConfigError, "must be a mapping"),
    ],
)
def test_spaces_that_are_none(grid, error, words):
    with pytest.raises(error, match=words.replace("|", r"\|")):
        space.of([grid])


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        space.read(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        space.read(tmp_path / "bad.yaml")
