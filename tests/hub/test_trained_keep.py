"""An adapter is taken for what it was trained for, and for more only when that is said."""

from __future__ import annotations

import json

import pytest

from tests.hub import adapters
from vlmcompress import CompressionConfig, StageConfig, hub, patch
from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.core.keep import AutoKeep
from vlmcompress.core.trained import within

FOR = r"trained for keep from 0\.25 to 0\.5 \(shares of an image's tokens\) with 'vtc_cls'"


def _config(low=0.25, high=0.5, keep=0.5, method="vtc_cls"):
    return CompressionConfig((StageConfig(method, keep),), trained_keep=(low, high))


@pytest.fixture
def folder(tmp_path):
    handle = patch(adapters.model(), "vtc_cls", keep=0.5)
    return hub.save(handle, tmp_path / "adapter", trained_keep=[0.25, 0.5])


def test_the_range_is_stored(folder):
    data = json.loads((folder / "vlmcompress_config.json").read_text())
    assert data["trained_keep"] == [0.25, 0.5]
    assert data["version"] == 2
    assert CompressionConfig.load(folder).trained_keep == (0.25, 0.5)


@pytest.mark.parametrize("keep", [0.25, 0.3, 0.5])
def test_inside(folder, keep):
    with hub.load(adapters.model(), folder, keep=keep) as handle:
        assert handle.config.stages[0].keep == keep
        assert handle.config.trained_keep == (0.25, 0.5)


@pytest.mark.parametrize("keep", [0.24, 0.51, 1.0, 3, "auto"])
def test_outside(folder, keep):
    model = adapters.model()
    with pytest.raises(ConfigError, match=FOR):
        hub.load(model, folder, keep=keep)
    adapters.assert_untouched(model, adapters.weights(adapters.model()))
    with hub.load(model, folder, keep=keep, force=True) as handle:
        adapters.logits(model)
        assert handle.last is not None
        assert handle.config.trained_keep == (0.25, 0.5)


@pytest.mark.parametrize("keep", [0.1, 3, "auto"])
def test_set(folder, keep):
    with hub.load(adapters.model(), folder) as handle:
        handle.set(keep=0.25)
        with pytest.raises(ConfigError, match=FOR):
            handle.set(keep=keep)
        assert handle.config.stages[0].keep == 0.25
        handle.set(keep=keep, force=True)
        handle.set(seed=4, positions="original")  # says nothing about the budget
        forced = handle.config.stages[0].keep
        assert forced == (AutoKeep() if keep == "auto" else keep)


def test_another_method_has_the_same_limit(folder):
    with hub.load(adapters.model(), folder) as handle:
        handle.set(method="divprune")
        assert handle.config.stages[0].keep == 0.5
        with pytest.raises(ConfigError, match="trained for"):
            handle.set(method="divprune", keep=0.1)


def test_a_configuration_alone_has_it_too():
    with pytest.raises(ConfigError, match=r"trained for keep=4 \(tokens per image\)"):
        patch(adapters.model(), _config(4, 4, keep=5))
    with patch(adapters.model(), _config(4, 4, keep=5), force=True) as handle:
        assert handle.config.stages[0].keep == 5


@pytest.mark.parametrize(
    ("spec", "inside"),
    [
        ("vtc_cls:0.5 | fastv@1:0.1", True),
        ("vtc_cls:0.1 | fastv@1:0.5", False),
        ("evit:0.9 | vtc_cls:0.5", True),
        ("pool:0.9 | vtc_cls:0.5", True),
        ("fastv@1:0.5", True),
        ("fastv@1:0.1", False),
        ("tome_tower:0.5", True),
        ("tome_tower:0.9", False),
        (adapters.ATP, True),  # its thresholds decide
    ],
)
def test_it_is_one_on_the_last_stage_before_the_language_model(spec, inside):
    stages = CompressionConfig.from_spec(spec).stages
    config = CompressionConfig(stages, trained_keep=(0.25, 0.5))
    if inside:
        patch(adapters.model(), config).remove()
    else:
        with pytest.raises(ConfigError, match="trained for"):
            patch(adapters.model(), config)


def test_towers_alone_have_it_too():
    from tests.hub.test_round_trip import tower

    model, _ = tower()
    with patch(model, _config(method="tome_tower")) as handle:
        with pytest.raises(ConfigError, match="trained for"):
            handle.set(keep=0.9)
        handle.set(keep=0.9, force=True)
    with pytest.raises(ConfigError, match="trained for"):
        patch(model, _config(keep=0.75, method="tome_tower"))


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ([0.5], ConfigTypeError, "lowest and the highest"),
        ("ab", ConfigTypeError, "lowest and the highest"),
        (0.5, ConfigTypeError, "lowest and the highest"),
        ([0.5, 0.25], ConfigError, "lowest budget comes first"),
        ([0.5, 4], ConfigError, "a share beside a count"),
        ([0.5, 1.5], ConfigError, "keep"),
        ([True, True], ConfigTypeError, "keep"),
        (["auto", "auto"], ConfigTypeError, "no budget"),
        ([0, 4], ConfigError, "keep"),
        ([float("nan"), 0.5], ConfigError, "keep"),
    ],
)
def test_ranges_that_are_none(value, error, match):
    with pytest.raises(error, match=match):
        CompressionConfig((StageConfig("vtc_cls", 0.5),), trained_keep=value)


def test_shares_and_counts_are_not_compared():
    assert within(1, (1, 8))
    assert not within(1.0, (1, 8))
    assert within(1.0, (0.5, 1.0))
    assert not within(1, (0.5, 1.0))
    assert not within(AutoKeep(), (0.5, 1.0))


def test_files_without_a_range_are_read_as_before():
    old = {"version": 1, "stages": [{"method": "vtc_cls", "keep": 0.5}]}
    config = CompressionConfig.from_dict(old)
    assert config.trained_keep is None
    assert config.to_dict()["version"] == 1
    with pytest.raises(ConfigError, match="trained_keep"):
        CompressionConfig.from_dict({**old, "trained_keep": [0.1, 0.5]})
    new = CompressionConfig.from_dict({**old, "version": 2, "trained_keep": [0.1, 0.5]})
    assert CompressionConfig.from_dict(new.to_dict()) == new
