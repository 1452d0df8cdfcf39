"""The doctor: facts from configurations, and verdicts that agree with `patch`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from tests import tiny
from vlmcompress import UnsupportedModelError, VLMCompressError, patch
from vlmcompress.doctor import config_of, diagnose, environment, families_table
from vlmcompress.families import SUPPORTED
from vlmcompress.methods import registry


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_verdicts_are_those_of_patch(family):
    model = tiny.build(family)
    found = diagnose(model.config)
    assert found.supported
    assert [v.name for v in found.methods] == registry.names()
    for verdict in found.methods:
        own = registry.create(verdict.name).own_budget
        keep = None if own else 0.5
        if verdict.runs:
            patch(model, verdict.name, keep=keep).remove()
            continue
        with pytest.raises(VLMCompressError) as caught:
            patch(model, verdict.name, keep=keep)
        assert str(caught.value) == verdict.reason


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_facts_are_those_of_a_call(family):
    model = tiny.build(family)
    found = diagnose(model)
    batch = tiny.inputs(model, [tiny.Prompt(images=1, text=5)])
    with patch(model, keep=0.5) as handle:
        with torch.no_grad():
            model(**batch)
        assert handle.report.method.startswith(found.default_method)
        assert handle.report.positions == found.positions
        if found.grid is not None:
            assert handle.last.grids == (found.grid,)
        if found.tower.layers is not None:
            assert handle.last.skipped_layers <= found.tower.layers - found.tower.layers_read


def test_llava_in_words():
    found = diagnose(config_of("llava"))
    text = str(found)
    assert found.tower.has_cls
    assert (found.tower.layers, found.tower.layers_read) == (24, 23)
    assert "24 x 24 = 576 per image" in text
    assert "default method: vtc_cls" in text
    assert [v.name for v in found.methods if not v.runs] == ["bus", "cdpruner"]
    assert "cannot run cdpruner: 'cdpruner' read(s) the question: pass patch(..., clip=" in text


def test_why_a_method_cannot_run():
    found = diagnose(config_of("qwen2_vl"))
    assert "cannot run vtc_cls" in str(found)
    assert "no [CLS] token" in str(found)
    assert found.grid is None


def test_large_models_need_no_memory():
    found = diagnose(config_of("kimi_k25"))
    assert found.supported
    assert found.text_layers > 50


@pytest.mark.parametrize("family", tiny.UNSUPPORTED)
def test_unsupported_families_are_named(family):
    config = tiny.configs.UNSUPPORTED_CONFIGS[family]()
    found = diagnose(config)
    assert not found.supported
    assert "not supported yet" in found.reason
    assert found.methods == ()


def test_text_models_are_refused():
    found = diagnose(tiny.configs.text_config())
    assert not found.supported
    assert "no vision-language model" in str(found)


def test_what_is_no_model_raises():
    with pytest.raises(UnsupportedModelError, match="no transformers configuration"):
        diagnose(torch.nn.Linear(1, 1))


def test_a_patched_model_is_left_alone():
    model = tiny.build("llava")
    with patch(model, "uniform", keep=3) as handle:
        assert diagnose(model).supported
        assert handle.config.to_spec() == "uniform:3"
    assert next(model.parameters()).device.type == "cpu"


def test_a_folder_is_read(tmp_path):
    tiny.configs.CONFIGS["llava"]().save_pretrained(tmp_path)
    assert diagnose(config_of(str(tmp_path))).model_type == "llava"


def test_an_unknown_name_raises(tmp_path):
    with pytest.raises(UnsupportedModelError, match="No configuration"):
        config_of(str(tmp_path / "nothing"))


def test_dictionaries_are_json_ready():
    import json

    json.dumps(diagnose(AutoConfig.for_model("llava")).to_dict())
    json.dumps(environment().to_dict())


def test_environment_lists_families_and_versions():
    text = str(environment())
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert all(family in text for family in SUPPORTED)


def test_the_table_has_a_row_per_family():
    rows = families_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(SUPPORTED)
