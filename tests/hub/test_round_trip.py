"""Adapters that were saved compute what they computed before."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModel

from tests.hub import adapters
from tests.seam.equalities import traces
from vlmcompress import CompressionConfig, hub, load_adapter, patch
from vlmcompress.core.errors import ConfigError, VLMCompressError
from vlmcompress.hub.folder import read

pytestmark = pytest.mark.filterwarnings(adapters.PEFT_WARNING)

SPECS = {
    "training-free": "vtc_cls:0.5",
    "several": "vtc_cls:0.5 | fastv@1:0.5",
    "parts in the language model": adapters.ATP,
    "parts in the tower": "sit:0.5",
    "parts behind another method": f"divprune:0.5 | {adapters.ATP}",
}


def _trained(handle: Any) -> None:
    """Parts that no seed makes."""
    if handle.parts is not None:
        with torch.no_grad():
            for parameter in handle.parts.parameters():
                parameter.add_(0.1)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_save_and_load(spec, lora, tmp_path):
    model = adapters.model()
    handle = patch(adapters.with_lora(model) if lora else model, spec, seed=3)
    _trained(handle)
    want = adapters.logits(model)
    assert hub.save(handle, tmp_path / "adapter") == tmp_path / "adapter"

    fresh = adapters.model()
    before, untouched = adapters.weights(fresh), adapters.logits(fresh)
    with hub.load(fresh, tmp_path / "adapter") as loaded:
        assert torch.equal(adapters.logits(fresh), want)
        assert not torch.equal(want, untouched)
        assert loaded.config.seed == 3
        assert [s.method for s in loaded.config.stages] == [s.method for s in handle.config.stages]
    assert hub.unload(fresh) is fresh
    assert list(fresh.state_dict()) == list(before)
    assert torch.equal(adapters.logits(fresh), untouched)
    assert traces(fresh) == []


def test_a_folder_holds_what_its_configuration_names_and_no_place(tmp_path):
    model = adapters.model()
    handle = patch(adapters.with_lora(model), f"vtc_cls:0.5 | {adapters.ATP}")
    folder = hub.save(handle, tmp_path / "adapter", results=adapters.RESULTS)
    assert read(folder).files == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "atp.safetensors",
        "results.json",
        "vlmcompress_config.json",
    ]
    config = CompressionConfig.load(folder)
    assert config.stages[1].options["weights"] == "atp.safetensors"
    again = hub.save(hub.load(adapters.model(), folder), tmp_path / "again")
    assert CompressionConfig.load(again) == config
    for path in [*folder.iterdir(), *again.iterdir()]:
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_modules_that_learn_whole_come_along(tmp_path):
    """The connector, trained beside LoRA: loaded, and taken off again."""
    model = adapters.model()
    peft = adapters.with_lora(model, modules_to_save=["multi_modal_projector"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    want = adapters.logits(model)
    folder = hub.save(patch(peft, "vtc_cls", keep=1.0), tmp_path / "adapter")

    fresh = adapters.model()
    before, untouched = adapters.weights(fresh), adapters.logits(fresh)
    hub.load(fresh, folder)
    torch.testing.assert_close(adapters.logits(fresh), want, rtol=0, atol=1e-6)
    hub.unload(fresh)
    assert all(torch.equal(fresh.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(adapters.logits(fresh), untouched)


def test_peft_reads_the_folder_too(tmp_path):
    model = adapters.model()
    want = adapters.logits(adapters.with_lora(model))
    folder = hub.save(patch(model, "vtc_cls", keep=0.5), tmp_path / "adapter")
    read_by_peft = PeftModel.from_pretrained(adapters.model(), str(folder)).eval()
    assert torch.equal(adapters.logits(read_by_peft.get_base_model()), want)


def test_a_folder_that_peft_wrote_becomes_an_adapter(tmp_path):
    model = adapters.model()
    peft = adapters.with_lora(model)
    peft.save_pretrained(tmp_path)
    handle = patch(peft, "divprune", keep=0.5)
    want = adapters.logits(model)
    hub.save(handle, tmp_path)
    fresh = adapters.model()
    hub.load(fresh, tmp_path)
    assert torch.equal(adapters.logits(fresh), want)


def tower():
    """A vision transformer without a language model, and pixels for it."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    return CLIPVisionModel(config).eval(), torch.randn(1, 3, 32, 32)


@torch.no_grad()
def test_a_tower_alone(tmp_path):
    model, pixels = tower()
    with patch(model, "tome_tower", keep=0.5) as handle:
        want = model(pixels).last_hidden_state
        hub.save(handle, tmp_path)
    assert "pipeline_tag: image-feature-extraction" in (tmp_path / "README.md").read_text()
    with hub.load(model, tmp_path):
        assert torch.equal(model(pixels).last_hidden_state, want)


def test_two_stages_of_one_method_keep_their_own_weights(tmp_path):
    model = adapters.model()
    first, second = "atp(layers=(1,), sample_rates=(0.5,))", "atp(layers=(2,), sample_rates=(0.5,))"
    handle = patch(model, f"{first} | {second}")
    folder = hub.save(handle, tmp_path / "adapter")
    names = [stage.options["weights"] for stage in CompressionConfig.load(folder).stages]
    assert names == ["atp.safetensors", "atp-2.safetensors"]
    assert all((folder / name).is_file() for name in names)


def test_merged_weights_serve_without_peft(tmp_path):
    model = adapters.model()
    handle = patch(adapters.with_lora(model), f"vtc_cls:0.5 | {adapters.ATP}")
    want = adapters.logits(model)
    folder = hub.save(handle, tmp_path / "adapter", trained_keep=(0.25, 0.5))

    loaded = adapters.model()
    hub.load(loaded, folder)
    merged = hub.merge(loaded, tmp_path / "merged")
    assert merged is loaded
    assert list(merged.state_dict()) == list(adapters.model().state_dict())
    assert traces(merged) == []

    served = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    with hub.load(served, tmp_path / "merged") as again:
        torch.testing.assert_close(adapters.logits(served), want, rtol=1e-5, atol=1e-5)
        assert again.config.trained_keep == (0.25, 0.5)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "LoRA is merged into these weights" in card


def test_a_peft_model_is_merged_as_peft_does():
    want = adapters.logits(adapters.with_lora(adapters.model()).merge_and_unload())
    peft = adapters.with_lora(adapters.model())
    merged = hub.merge(peft)
    assert torch.equal(adapters.logits(merged), want)
    assert not hasattr(merged, "peft_config")


def test_what_cannot_be_merged(tmp_path):
    with pytest.raises(ConfigError, match="carries no LoRA"):
        hub.merge(adapters.model())
    model = adapters.model()
    peft = adapters.with_lora(model)
    with pytest.raises(VLMCompressError, match="is not patched"):
        hub.merge(peft, tmp_path / "merged")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "adapter_config.json").write_text("{}")
    with (
        patch(peft, "vtc_cls", keep=0.5),
        pytest.raises(ConfigError, match=r"adapter_config\.json"),
    ):
        hub.merge(peft, tmp_path / "merged")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(float("nan"))
    with pytest.raises(VLMCompressError, match="NaN"):
        hub.merge(peft)
    assert hasattr(model, "peft_config")


def test_several_loras_are_refused(tmp_path):
    model = adapters.model()
    peft = adapters.with_lora(model)
    peft.add_adapter("second", peft.peft_config["default"])
    with pytest.raises(ConfigError, match="'default', 'second'"):
        hub.save(patch(peft, "vtc_cls", keep=0.5), tmp_path)


def test_a_second_adapter_needs_the_first_off(tmp_path):
    folder = hub.save(patch(adapters.with_lora(adapters.model()), "vtc_cls", keep=0.5), tmp_path)
    model = adapters.model()
    hub.load(model, folder).remove()
    with pytest.raises(ConfigError, match="carries LoRA already"):
        hub.load(model, folder)
    hub.unload(model)
    hub.load(model, folder)
    with pytest.raises(VLMCompressError, match="patched already"):
        hub.load(model, folder)


def test_the_old_name_is_the_same():
    assert load_adapter is hub.load


def test_saving_over_lora_of_something_else_is_refused(tmp_path):
    hub.save(patch(adapters.with_lora(adapters.model()), "vtc_cls", keep=0.5), tmp_path)
    with pytest.raises(ConfigError, match="which carries none"):
        hub.save(patch(adapters.model(), "vtc_cls", keep=0.5), tmp_path)


def test_a_removed_patch_has_nothing_to_save(tmp_path):
    handle = patch(adapters.model(), "vtc_cls", keep=0.5)
    handle.remove()
    with pytest.raises(VLMCompressError, match="patch"):
        hub.save(handle, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_results_go_along_unchanged(tmp_path):
    handle = patch(adapters.model(), "vtc_cls", keep=0.5)
    hub.save(handle, tmp_path, results=adapters.RESULTS)
    assert json.loads((tmp_path / "results.json").read_text()) == adapters.RESULTS
    hub.save(handle, tmp_path)  # keeps those that are there
    assert "0.8625" in (tmp_path / "README.md").read_text()
