"""Configurations: spec strings, dicts, files, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcompress import AutoKeep, CompressionConfig, ConfigError, ConfigTypeError, StageConfig
from vlmcompress.core.config import CONFIG_NAME, CONFIG_VERSION

values = st.one_of(
    st.booleans(), st.integers(-9, 9), st.floats(-2, 2), st.text("abc d'\"", max_size=5),
    st.tuples(st.integers(-5, 5), st.floats(0.1, 0.9)),
)  # fmt: skip
keeps = st.one_of(
    st.none(), st.integers(1, 900), st.floats(0.001, 1.0), st.builds(AutoKeep, st.floats(0.01, 1.0))
)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
stages = st.builds(
    StageConfig,
    names,
    keeps,
    st.dictionaries(names.filter(str.isidentifier), values, max_size=3),
    st.one_of(st.none(), st.integers(-4, 30), st.floats(0.01, 0.99)),
)


def usable(stage):
    import keyword

    plain = not any(keyword.iskeyword(name) for name in stage.options)
    # "|", ")" and ":" inside a quoted option would need a grammar; options are numbers in practice.
    return plain and not any(
        isinstance(v, str) and set(v) & set("|):@") for v in stage.options.values()
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(stages.filter(usable), min_size=1, max_size=3), st.integers(-5, 99))
def test_specs_and_dicts_round_trip(parts, seed):
    config = CompressionConfig(tuple(parts), "original", seed)
    assert CompressionConfig.from_spec(config.to_spec(), positions="original", seed=seed) == config
    assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("vtc_cls", [StageConfig("vtc_cls")]),
        (
            "vtc_cls:0.25 | fastv@2:0.5",
            [StageConfig("vtc_cls", 0.25), StageConfig("fastv", 0.5, site=2)],
        ),
        ("a:64", [StageConfig("a", 64)]),
        ("a:auto", [StageConfig("a", AutoKeep())]),
        ("a:auto(0.5)", [StageConfig("a", AutoKeep(0.5))]),
        ("a(layers=(-4, -2), x='y'):1", [StageConfig("a", 1, {"layers": (-4, -2), "x": "y"})]),
        ("a@0.25:0.5", [StageConfig("a", 0.5, site=0.25)]),
    ],
)
def test_spec_strings(spec, want):
    assert list(CompressionConfig.from_spec(spec).stages) == want


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "|",
        "a:",
        "a:x",
        "a:0",
        "a:1.5",
        "a:True",
        "a(1):0.5",
        "a(x=):0.5",
        "a(**k)",
        "a(x=y)",
        "a@b",
        "a b",
        "1a",
    ],
)
def test_specs_that_cannot_be_read(spec):
    with pytest.raises((ConfigError, ConfigTypeError)):
        CompressionConfig.from_spec(spec)


GOOD = {"version": 1, "stages": [{"method": "a", "keep": 0.5}]}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"version": CONFIG_VERSION + 1, "surprise": 1}, ConfigError, "upgrade"),
        ({"extra": 1}, ConfigError, "extra"),
        ({"positions": "compact"}, ConfigError, "contiguous"),
        ({"seed": 1.5}, ConfigTypeError, "seed"),
        ({"stages": []}, ConfigError, "at least one"),
        ({"stages": "a"}, ConfigTypeError, "list"),
        ({"stages": [{"keep": 0.5}]}, ConfigError, "method"),
        ({"stages": [{"method": "a", "keep": 2.5}]}, ConfigError, "keep"),
        ({"stages": [{"method": "a", "options": 3}]}, ConfigTypeError, "mapping"),
        ({"stages": [{"method": "a", "keep": {"tau": 1}}]}, ConfigError, "auto"),
    ],
)
def test_dicts_are_checked(change, error, text):
    with pytest.raises(error, match=text):
        CompressionConfig.from_dict({**GOOD, **change})


def test_missing_keys_and_non_mappings():
    with pytest.raises(ConfigError, match="version"):
        CompressionConfig.from_dict({"stages": GOOD["stages"]})
    with pytest.raises(ConfigTypeError, match="mapping"):
        CompressionConfig.from_dict([1])


def test_files(tmp_path):
    config = CompressionConfig.from_spec("vtc_cls:0.25", positions="original", seed=3)
    path = config.save(tmp_path)
    assert path.name == CONFIG_NAME
    assert CompressionConfig.load(tmp_path) == CompressionConfig.load(path) == config
    path.write_text("{")
    with pytest.raises(ConfigError, match="JSON"):
        CompressionConfig.load(tmp_path)
