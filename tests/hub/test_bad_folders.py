"""What is no adapter of a model is refused, and the model is as it was."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.hub import adapters
from tests.seam.equalities import traces
from vlmcompress import hub, patch
from vlmcompress.core.errors import (
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    MissingExtraError,
    UnknownMethodError,
)
from vlmcompress.hub import lora

pytestmark = pytest.mark.filterwarnings(adapters.PEFT_WARNING)

CONFIG, PEFT, LORA = "vlmcompress_config.json", "adapter_config.json", "adapter_model.safetensors"
OPENED: list[str] = []


def note(text: str) -> None:
    """What a pickle runs."""
    OPENED.append(text)


class Trap:
    """Says so when it is unpickled."""

    def __reduce__(self) -> Any:
        return note, ("opened",)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with LoRA and parts."""
    handle = patch(adapters.with_lora(adapters.model()), f"vtc_cls:0.5 | {adapters.ATP}")
    return hub.save(handle, tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


@pytest.fixture
def refused(folder: Path):
    """A function that asserts that the folder is refused and leaves no trace."""
    model = adapters.model()
    before = adapters.weights(model)
    modes = [module.training for module in model.modules()]

    def check(error: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            hub.load(model, folder, **options)
        adapters.assert_untouched(model, before)
        assert [module.training for module in model.modules()] == modes
        assert traces(model) == []

    return check


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_good_one_loads(good):
    with hub.load(adapters.model(), good) as handle:
        assert handle.parts is not None


def test_a_folder_without_configuration(folder, refused):
    (folder / CONFIG).unlink()
    refused(ConfigError, "is no adapter")


def test_a_folder_that_is_not_there(folder, refused):
    shutil.rmtree(folder)
    refused(ConfigError, "is no adapter")


@pytest.mark.parametrize("text", ["{", "\x00\xff", ""])
def test_a_configuration_that_is_no_json(folder, refused, text):
    (folder / CONFIG).write_bytes(text.encode("latin"))
    refused(ConfigError, "JSON")


def test_a_configuration_of_something_else(folder, refused):
    (folder / CONFIG).write_text('["vtc_cls"]')
    refused(ConfigTypeError, "mapping")
    (folder / CONFIG).write_text('{"model_type": "llava"}')
    refused(ConfigError, "missing keys")


def test_a_newer_configuration(folder, refused):
    edit(folder / CONFIG, version=99, stages="unknown")
    refused(ConfigError, "upgrade vlmcompress")


def test_an_unknown_method(folder, refused):
    edit(folder / CONFIG, stages=[{"method": "vtc_clss", "keep": 0.5}])
    refused(UnknownMethodError, "Did you mean 'vtc_cls'")


@pytest.mark.parametrize("place", ["../atp.safetensors", "/etc/passwd", "..", "a\\b.safetensors"])
def test_weights_elsewhere(folder, refused, place):
    stages = json.loads((folder / CONFIG).read_text())["stages"]
    stages[1]["options"]["weights"] = place
    edit(folder / CONFIG, stages=stages)
    refused(ConfigError, "beside its")


def test_parts_that_are_pickled(folder, refused):
    OPENED.clear()
    (folder / "atp.bin").write_bytes(pickle.dumps(Trap()))
    stages = json.loads((folder / CONFIG).read_text())["stages"]
    stages[1]["options"]["weights"] = "atp.bin"
    edit(folder / CONFIG, stages=stages)
    refused(CheckpointError, "run code")
    shutil.copy(folder / "atp.bin", folder / "atp.safetensors")
    stages[1]["options"]["weights"] = "atp.safetensors"
    edit(folder / CONFIG, stages=stages)
    refused(CheckpointError, "no usable weights")
    assert not OPENED


def test_lora_that_is_pickled(folder, refused):
    OPENED.clear()
    (folder / LORA).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(CheckpointError, "never read")
    shutil.move(folder / "adapter_model.bin", folder / LORA)
    refused(CheckpointError, "no usable weights")
    assert not OPENED
    assert pickle.loads(pickle.dumps(Trap())) is None
    assert OPENED  # so the trap works


def test_parts_that_are_missing_or_cut(folder, refused):
    data = (folder / "atp.safetensors").read_bytes()
    (folder / "atp.safetensors").write_bytes(data[: len(data) // 2])
    refused(CheckpointError, "no usable weights")
    (folder / "atp.safetensors").unlink()
    refused(CheckpointError, "no usable weights")


def test_parts_of_other_options(folder, refused):
    stages = json.loads((folder / CONFIG).read_text())["stages"]
    stages[1]["options"]["layers"] = [2]
    edit(folder / CONFIG, stages=stages)
    refused(ConfigError, "was made for")


def test_lora_that_is_cut(folder, refused):
    data = (folder / LORA).read_bytes()
    (folder / LORA).write_bytes(data[: len(data) // 2])
    refused(CheckpointError, "no usable weights")


def _change(folder: Path, change: Any) -> None:
    tensors = load_file(folder / LORA)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, folder / LORA)


def test_lora_that_holds_nan(folder, refused):
    _change(folder, lambda tensors, name: tensors[name].fill_(float("nan")))
    refused(CheckpointError, "NaN")


def test_lora_of_other_sizes(folder, refused):
    _change(folder, lambda tensors, name: tensors.update({name: torch.zeros(3, 3)}))
    refused(CheckpointError, "another model")


def test_lora_that_is_not_whole(folder, refused):
    _change(folder, lambda tensors, name: tensors.pop(name))
    refused(CheckpointError, "1 weights are missing or left over")


def test_lora_with_more_than_the_model_has(folder, refused):
    _change(folder, lambda tensors, name: tensors.update({f"{name}.lora_A.weight": torch.ones(1)}))
    refused(CheckpointError, "left over")


def test_lora_of_modules_that_the_model_lacks(folder, refused):
    edit(folder / PEFT, target_modules=["query_key_value"])
    refused(ConfigError, "another model")


def test_lora_of_another_family(good):
    other = tiny.build("paligemma")
    before = adapters.weights(other)
    with pytest.raises(CheckpointError, match="another model"):
        hub.load(other, good)
    adapters.assert_untouched(other, before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"bias": "all"}, "bias='all'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "megatron_core='this'"),
        ({"something_new": True}, "something_new=True"),
        ({"r": 0}, "no configuration of LoRA|another model"),
    ],
)
def test_adapters_that_change_more_than_can_be_taken_back(folder, refused, changes, match):
    edit(folder / PEFT, **changes)
    refused((ConfigError, CheckpointError), match)


def test_a_peft_configuration_that_cannot_be_read(folder, refused):
    (folder / PEFT).write_text("[]")
    refused(ConfigError, "holds a list")
    (folder / PEFT).write_text("{")
    refused(ConfigError, "no configuration of peft")


def test_a_patch_that_is_refused_takes_lora_off_again(folder, refused):
    refused(ConfigError, "says twice|own budget|keep", keep=3.5)


def test_lora_needs_peft(refused, monkeypatch):
    def missing(module: str) -> Any:
        raise MissingExtraError(module, "train")

    monkeypatch.setattr(lora, "require", missing)
    refused(MissingExtraError, r"vlmcompress\[train\]")


def test_code_beside_an_adapter_is_not_looked_at(folder):
    (folder / "modeling_llava.py").write_text("raise SystemExit")
    edit(folder / PEFT, auto_mapping={"parent_library": "modeling_llava"})
    with hub.load(adapters.model(), folder) as handle:
        assert handle.config.stages


def test_results_that_are_none(folder):
    handle = patch(adapters.model(), "vtc_cls", keep=0.5)
    for bad in ({"evaluations": 3}, {"evaluations": [{"value": 1}]}, {"x": object()}):
        with pytest.raises(ConfigError):
            hub.save(handle, folder.parent / "new", results=bad)
        assert not (folder.parent / "new" / CONFIG).exists()
    with pytest.raises(ConfigError, match="results file"):
        hub.save(handle, folder.parent / "new", results=folder / "nothing.json")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        hub.save(patch(adapters.model(), "vtc_cls", keep=0.5), tmp_path / "file" / "adapter")
