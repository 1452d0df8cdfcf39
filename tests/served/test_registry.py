"""What the plugin is told, what it refuses, and that it leaves all other servers alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import tiny
from tests.project import ROOT, project
from tests.served.engine import Registry, model_config
from vlmcompress import CompressionConfig
from vlmcompress.core.config import StageConfig
from vlmcompress.core.errors import (
    ConfigError,
    ConfigTypeError,
    UnsupportedModelError,
    VLMCompressError,
)
from vlmcompress.integrations.vllm import registry as plugin
from vlmcompress.integrations.vllm import settings
from vlmcompress.integrations.vllm.settings import Settings

LLAVA = ["LlavaForConditionalGeneration"]
TOLD = {"method": "vtc_cls", "keep": 0.3}


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(plugin, "engine_version", lambda: plugin.TESTED_VERSIONS[-1])
    made = Registry()
    plugin.attach(made)
    plugin.attach(made)
    return made


def test_what_is_told_nothing_stays_the_engines(registry):
    config = tiny.build("llava").config
    assert registry.inspect_model_cls(LLAVA, model_config(config)) == "inspected"
    assert registry.resolve_model_cls("PaliGemma", model_config(config)) == "resolved"
    assert not registry.registered
    assert plugin.serving_of(model_config(config)) is None


@pytest.mark.parametrize("ask", ["inspect_model_cls", "resolve_model_cls"])
def test_what_is_told_to_compress_gets_the_plugins_class(registry, ask):
    told = model_config(tiny.build("llava").config, TOLD)
    assert getattr(registry, ask)(LLAVA, told) == ask.partition("_")[0].rstrip("e") + "ed"
    assert registry.registered == {LLAVA[0]: plugin.SERVED[LLAVA[0]]}
    serving = plugin.serving_of(told)
    assert serving is plugin.serving_of(told)
    assert serving.stage.keep == 0.3


def test_a_file_beside_the_model_is_enough(registry, tmp_path):
    CompressionConfig((StageConfig("divprune", 5),)).save(tmp_path)
    config = tiny.build("llava").config
    beside = model_config(config, model=str(tmp_path))
    registry.inspect_model_cls(LLAVA, beside)
    assert plugin.serving_of(beside).stage.method.name == "divprune"
    # The engine asks for the language model's class with the same folder.
    registry.resolve_model_cls(
        ["LlamaForCausalLM"], model_config(config.text_config, model=str(tmp_path))
    )
    off = model_config(tiny.build("llava").config, False, str(tmp_path))
    assert plugin.serving_of(off) is None


def test_other_architectures_are_refused(registry):
    with pytest.raises(UnsupportedModelError, match="serves LlavaFor") as raised:
        registry.inspect_model_cls(
            ["PaliGemmaForConditionalGeneration"],
            model_config(tiny.build("paligemma").config, TOLD),
        )
    assert "vlmcompress.patch" in str(raised.value)
    registry.resolve_model_cls(
        ["Qwen2ForCausalLM"], model_config(tiny.build("qwen2_vl").config, "pool:4")
    )
    assert not registry.registered
    other = model_config(tiny.build("llava").config, TOLD)
    other.model_impl = "transformers"
    with pytest.raises(UnsupportedModelError, match="model_impl='transformers'"):
        registry.inspect_model_cls(LLAVA, other)


def test_other_versions_are_refused(registry, monkeypatch):
    monkeypatch.setattr(plugin, "engine_version", lambda: "9.9.0+cpu")
    told = model_config(tiny.build("llava").config, TOLD)
    with pytest.raises(ConfigError, match=r"vLLM 9\.9\.0\+cpu was never tested") as raised:
        registry.inspect_model_cls(LLAVA, told)
    assert plugin.TESTED_VERSIONS[-1] in str(raised.value)
    brave = model_config(tiny.build("llava").config, {**TOLD, "untested_engine": True})
    assert registry.inspect_model_cls(LLAVA, brave) == "inspected"
    plain = model_config(tiny.build("llava").config)
    assert registry.inspect_model_cls(LLAVA, plain) == "inspected"


def test_versions_are_compared_without_their_build():
    plugin.check_version(Settings(None), plugin.TESTED_VERSIONS[-1] + "+cpu")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("vtc_cls:0.3", Settings("vtc_cls:0.3")),
        (TOLD, Settings("vtc_cls", 0.3)),
        ({"keep": 0.3}, Settings(None, 0.3)),
        ({**TOLD, "seed": 3}, Settings("vtc_cls", 0.3, seed=3)),
        (None, None),
        (False, None),
    ],
)
def test_what_can_be_told(given, found, tmp_path):
    assert settings.read(given, str(tmp_path)) == found


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (0.3, ConfigTypeError, "give a spec string"),
        ({"ratio": 0.3}, ConfigError, "unknown keys ratio"),
        ({"method": 3}, ConfigTypeError, "it must be a name"),
        ({"config": 3}, ConfigTypeError, "it must be a path"),
        ({"config": "missing", "method": "vtc_cls"}, ConfigError, "give one of them"),
        ({"config": "missing"}, ConfigError, "is no adapter"),
        ({**TOLD, "untested_engine": "yes"}, ConfigTypeError, "true or false"),
    ],
)
def test_what_cannot(given, error, message, tmp_path):
    with pytest.raises(error, match=message):
        settings.read(given, str(tmp_path))


def test_a_budget_replaces_the_files(tmp_path):
    config = CompressionConfig((StageConfig("vtc_cls", 0.3),), trained_keep=(0.25, 0.5))
    config.save(tmp_path)
    assert settings.read({"keep": 0.5}, str(tmp_path)) == Settings(config, 0.5)
    named = settings.read({"config": str(tmp_path)}, "elsewhere")
    assert named == Settings(config)
    assert settings.read({"config": str(tmp_path / "vlmcompress_config.json")}, ".") == named
    with pytest.raises(ConfigError, match="seed, which"):
        settings.read({"keep": 0.5, "seed": 1}, str(tmp_path))


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "vlmcompress_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(VLMCompressError):
        settings.read(None, str(tmp_path))


def test_the_entry_point_is_light():
    points = project()["entry-points"]["vllm.general_plugins"]
    module, _, name = points["vlmcompress"].partition(":")
    code = (
        f"import json, sys; from {module} import {name}; "
        "print(json.dumps(sorted({'vllm', 'torch', 'transformers'} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
