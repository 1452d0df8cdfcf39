"""Images encoded once, written to a file, and asked about from there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests import tiny
from tests.seam import oracle
from vlmcompress import CacheMismatchError, CheckpointError, patch
from vlmcompress.methods.prompt.llava_mini import LLaVAMini

METHODS: dict[str, Any] = {
    "uniform": ("uniform", 5),
    "voco_llama": ("voco_llama", 3),
    "llava_mini": (LLaVAMini(tokens=4, fusion=1, heads=4), None),
}
FAMILIES = ("llava", "qwen2_vl", "llava_next")
HEADER = "vlmcompress_encoding"


def encoded(tmp_path: Any, family: str = "llava", method: str = "uniform") -> Any:
    """A model, its call without pixels, what it said with them, and the file of its images."""
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED)
    text = {k: v for k, v in call.items() if not k.startswith("pixel")}
    path = str(tmp_path / "images.safetensors")
    name, keep = METHODS[method]
    with patch(model, name, keep=keep) as handle, torch.no_grad():
        handle.encode(**call).save(path)
        said = model.generate(**call, **oracle.greedy(model, 3))
        kept, assignments = handle.last.kept, handle.last.assignments
    return model, text, said, path, (kept, assignments)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_answers_come_from_the_file(tmp_path, family, method):
    model, text, said, path, (kept, assignments) = encoded(tmp_path, family, method)
    name, keep = METHODS[method]
    with patch(model, name, keep=keep) as handle:
        images = handle.load_encoding(path)
        for _ in range(2):
            again = model.generate(**text, **oracle.greedy(model, 3), mm_encoder_outputs=images)
            assert torch.equal(again, said)
        assert all(map(torch.equal, handle.kept, kept))
        assert all(map(torch.equal, handle.last.assignments, assignments))


def test_another_model_refuses_them(tmp_path):
    *_, path, _ = encoded(tmp_path)
    with (
        patch(tiny.build("qwen2_vl"), "uniform", keep=5) as handle,
        pytest.raises(CacheMismatchError, match="llava"),
    ):
        handle.load_encoding(path)


def spoil(path: str, how: str) -> None:
    """Make a file unusable."""
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    header = json.loads(metadata[HEADER])
    if how == "newer":
        metadata = {HEADER: json.dumps({**header, "format": 99})}
    elif how == "no header":
        metadata = {}
    elif how == "broken header":
        metadata = {HEADER: "{"}
    elif how == "a tensor is missing":
        del tensors["features.1"]
    elif how == "no lengths":
        metadata = {HEADER: json.dumps({k: v for k, v in header.items() if k != "lengths"})}
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("newer", "upgrade"),
        ("no header", "format"),
        ("broken header", "no compressed images"),
        ("a tensor is missing", "features.1"),
        ("no lengths", "lengths"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, how, match):
    model, *_, path, _ = encoded(tmp_path)
    spoil(path, how)
    with (
        patch(model, "uniform", keep=5) as handle,
        pytest.raises(CheckpointError, match=match),
    ):
        handle.load_encoding(path)


def test_files_that_are_not_there(tmp_path):
    model, *_, path, _ = encoded(tmp_path)
    with patch(model, "uniform", keep=5) as handle:
        with pytest.raises(CheckpointError, match="no compressed images"):
            handle.load_encoding(tmp_path / "missing.safetensors")
        images = handle.load_encoding(path)
        with pytest.raises(CheckpointError, match="cannot be written"):
            images.save(tmp_path / "no" / "folder.safetensors")
