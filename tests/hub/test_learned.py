"""Trained compressors by the name of their folder."""

from __future__ import annotations

import pytest
import torch

from tests.hub import adapters
from tests.hub.server import TOKEN, serving
from vlmcompress import CompressionConfig, hub, patch
from vlmcompress.core.errors import CheckpointError, ConfigError
from vlmcompress.methods.connector.vqtoken import VQToken
from vlmcompress.methods.trained import LearnedCompressor

pytestmark = pytest.mark.filterwarnings(adapters.PEFT_WARNING)

OPTIONS = {"attention": True, "heads": 4, "tokens": 4}


def trained(spec=None, keep=None):
    """A handle whose compressor has weights that no seed makes, and its model's logits."""
    model = adapters.model()
    handle = patch(model, VQToken(**OPTIONS) if spec is None else spec, keep=keep)
    with torch.no_grad():
        for parameter in handle.parts.parameters():
            parameter.add_(0.1)
    return handle, adapters.logits(model)


def test_a_folder_becomes_a_method(tmp_path):
    handle, want = trained()
    folder = hub.save(handle, tmp_path / "vq")
    method = LearnedCompressor.from_pretrained(folder)
    assert isinstance(method, VQToken)
    assert {name: getattr(method, name) for name in OPTIONS} == OPTIONS
    assert method.weights == str(folder / "vqtoken.safetensors")
    fresh = adapters.model()
    with patch(fresh, method):
        assert torch.equal(adapters.logits(fresh), want)
    with hub.load(fresh, folder):
        assert torch.equal(adapters.logits(fresh), want)


def test_a_count_comes_along_and_a_share_is_asked_for(tmp_path):
    spec = "vqtoken(attention=True, heads=4)"
    handle, want = trained(spec, keep=4)
    method = VQToken.from_pretrained(hub.save(handle, tmp_path / "count"))
    assert method.tokens == 4
    fresh = adapters.model()
    with patch(fresh, method):
        assert torch.equal(adapters.logits(fresh), want)

    handle, want = trained(spec, keep=0.25)
    method = VQToken.from_pretrained(hub.save(handle, tmp_path / "share"))
    with pytest.raises(ConfigError, match="has no budget"):
        patch(fresh, method)
    with patch(fresh, method, keep=0.25):
        assert torch.equal(adapters.logits(fresh), want)


def test_a_method_saves_itself(tmp_path):
    handle, want = trained()
    method = VQToken.from_pretrained(hub.save(handle, tmp_path / "first"))
    second = method.save_pretrained(tmp_path / "second", license="mit")
    assert "license: mit" in (second / "README.md").read_text()
    assert str(tmp_path) not in (second / "vlmcompress_config.json").read_text()
    again = VQToken.from_pretrained(second)
    fresh = adapters.model()
    with patch(fresh, again):
        assert torch.equal(adapters.logits(fresh), want)
    again.save_pretrained(second)  # over itself
    assert CompressionConfig.load(second) == CompressionConfig.load(tmp_path / "first")


def test_a_method_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch):
    handle, want = trained()
    method = VQToken.from_pretrained(hub.save(handle, tmp_path / "vq"))
    with serving() as server:
        url = method.push_to_hub("me/vq", endpoint=server.endpoint, token=TOKEN)
        assert url == server.address("models", "me/vq")
        assert set(server.repositories["models/me/vq"].files) == {
            *("README.md", "vlmcompress_config.json", "vqtoken.safetensors")
        }
        back = LearnedCompressor.from_pretrained(
            "me/vq", endpoint=server.endpoint, cache_dir=tmp_path / "downloads"
        )
    fresh = adapters.model()
    with patch(fresh, back):
        assert torch.equal(adapters.logits(fresh), want)


def test_what_is_no_trained_compressor(tmp_path):
    def refused(handle, match, kind=LearnedCompressor):
        folder = hub.save(handle, tmp_path / match.replace(" ", "-"))
        with pytest.raises(ConfigError, match=match):
            kind.from_pretrained(folder)

    model = adapters.model()
    with patch(model, "vtc_cls", keep=0.5) as handle:
        refused(handle, "'vtc_cls', which is no LearnedCompressor")
    with patch(model, "vtc_cls:0.5 | fastv@1:0.5") as handle:
        refused(handle, "2 methods")
    with patch(adapters.with_lora(model), VQToken(**OPTIONS)) as handle:
        refused(handle, "LoRA of the model")
    with pytest.raises(ConfigError, match="is no adapter"):
        LearnedCompressor.from_pretrained(tmp_path)


def test_methods_without_weights_or_with_pickled_ones(tmp_path):
    with pytest.raises(ConfigError, match="no weights of its own"):
        VQToken(**OPTIONS).save_pretrained(tmp_path / "new")
    (tmp_path / "vq.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="can be shared"):
        VQToken(**OPTIONS, weights=str(tmp_path / "vq.bin")).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
