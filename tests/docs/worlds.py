"""Where the snippets of a page run: what the page takes for granted, and what stands in for it.

Checkpoints and the Hub are replaced, nothing else. A world is a context manager that yields the
names which the page uses without making them.
"""

from __future__ import annotations

import socket
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

from tests.project import ROOT
from vlmcompress import CompressionConfig, handle_of, patch, reference
from vlmcompress.core.errors import VLMCompressError
from vlmcompress.methods.layouts import layout

CHECKPOINT = "llava-hf/llava-1.5-7b-hf"
ADAPTERS = sorted(path for path in (ROOT / "adapters").iterdir() if path.is_dir())
CLIP = "openai/clip-vit-large-patch14-336"


@dataclass(frozen=True)
class Place:
    """What a world may change.

    Attributes:
        folder: the working directory.
        monkeypatch: undone after the page.
    """

    folder: Path
    monkeypatch: pytest.MonkeyPatch


World = Callable[[Place], Any]


@contextmanager
def nothing(place: Place) -> Iterator[dict[str, Any]]:
    """The page makes everything itself."""
    yield {}


def checkpoint(place: Place) -> tuple[Any, list[str]]:
    """The reference model in place of every checkpoint, and the list of those asked for."""
    import transformers

    model, processor = reference.load()
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    asked: list[str] = []

    def stand_in(value: Any) -> Any:
        def from_pretrained(name: str, **options: Any) -> Any:
            asked.append(name)
            return value

        return staticmethod(from_pretrained)

    change, auto = place.monkeypatch.setattr, transformers.AutoModelForImageTextToText
    change(auto, "from_pretrained", stand_in(model))
    change(transformers.AutoProcessor, "from_pretrained", stand_in(processor))
    change(reference, "load", lambda: (model, processor), raising=False)
    return model, asked


@contextmanager
def readme(place: Place) -> Iterator[dict[str, Any]]:
    """A checkpoint and a photograph."""
    model, asked = checkpoint(place)
    Image.effect_noise((300, 200), 80).convert("RGB").save("photo.jpg")
    yield {}
    assert set(asked) == {CHECKPOINT}
    assert "generate" not in model.__dict__  # every handle was taken off


@contextmanager
def tuned(place: Place) -> Iterator[dict[str, Any]]:
    """A checkpoint, and what `vlmcompress tune` wrote for it."""
    _, asked = checkpoint(place)
    Path("runs/tune").mkdir(parents=True)
    CompressionConfig.from_spec("tome_tower:0.5 | vtc_cls:0.25").save("runs/tune")
    yield {}
    assert asked == [CHECKPOINT]


@contextmanager
def given(place: Place) -> Iterator[dict[str, Any]]:
    """Model, processor and questions."""
    model, processor = reference.load()
    (place.folder / "adapters").symlink_to(ROOT / "adapters")
    yield {
        "model": model,
        "processor": processor,
        "samples": list(reference.samples("test", 2)),
        "patch": patch,
    }


@contextmanager
def one_by_one(place: Place) -> Iterator[dict[str, Any]]:
    """A model as deep as those of the papers; every line that patches it finds it unpatched."""
    config = reference.load()[0].config
    config.text_config.num_hidden_layers = 32
    model, processor = LlavaForConditionalGeneration(config).eval(), reference.load()[1]
    (sample,) = reference.samples("test", 1)
    text = reference.prompt(processor, sample.question)
    batch = dict(processor(text=text, images=sample.image, return_tensors="pt"))

    def patch_anew(found: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("clip") == CLIP:
            options["clip"] = reference.load_text_head()
        remove(found)
        return patch(found, *arguments, **options)

    parts = patch(model, "mqt(faithful=True)", keep=64).parts.state_dict()
    known = layout("mqt")
    save_file({known.prefix + k: v.contiguous() for k, v in parts.items()}, "MQT-LLaVA-7b")
    yield {
        "model": model,
        "processor": processor,
        "patch": patch_anew,
        "torch": torch,
        "batch": batch,
        "labels": batch["input_ids"],
    }


def remove(model: Any) -> None:
    """Take the patch off, if there is one."""
    try:
        handle = handle_of(model)
    except VLMCompressError:
        return
    handle.remove()


@contextmanager
def towers(place: Place) -> Iterator[dict[str, Any]]:
    """Vision transformers of three libraries."""
    from tests.seam import bare_models

    yield {
        "patch": patch,
        "open_clip_model": bare_models._open_clip(),
        "timm_vit": bare_models._timm(),
        "clip_model": bare_models._two_towers("CLIP", "CLIPModel", "sdpa"),
    }


@contextmanager
def hub(place: Place) -> Iterator[dict[str, Any]]:
    """A Hub on this machine."""
    from tests.hub.server import serving

    constants, where = "huggingface_hub.constants", "/{repo_id}/resolve/{revision}/{filename}"
    change = place.monkeypatch.setattr
    change(f"{constants}.HF_HUB_CACHE", str(place.folder / "cache"))
    change(f"{constants}.HF_HUB_OFFLINE", False)
    with serving() as server:
        change(f"{constants}.ENDPOINT", server.endpoint)
        change(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + where)
        yield {"repositories": server.repositories}


@contextmanager
def garden(place: Place) -> Iterator[dict[str, Any]]:
    """The file of facts that the page writes is where it says."""
    from vlmcompress import families

    space: dict[str, Any] = {}

    class Facts(types.ModuleType):
        @property
        def FAMILY(self) -> Any:
            return space["FAMILY"]

    name = "garden_vl"
    place.monkeypatch.setitem(sys.modules, f"vlmcompress.families.{name}", Facts(name))
    place.monkeypatch.setattr(families, "SUPPORTED", (*families.SUPPORTED, name))
    yield space


@contextmanager
def shelf(place: Place) -> Iterator[dict[str, Any]]:
    """The model of the adapters, which lie in the working directory."""
    model, _ = reference.load()
    for folder in ADAPTERS:
        (place.folder / folder.name).symlink_to(folder)
    yield {"model": model}


@contextmanager
def one_rank(place: Place) -> Iterator[dict[str, Any]]:
    """What torchrun tells a process, the only one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}
    for name, value in told.items():
        place.monkeypatch.setenv(name, str(value))
    try:
        yield {}
    finally:
        torch.distributed.destroy_process_group()


#: Worlds of pages that take something for granted.
WORLDS: dict[str, World] = {
    "README.md": readme,
    **{f"adapters/{folder.name}/README.md": shelf for folder in ADAPTERS},
    "docs/adapters.md": hub,
    "docs/adding-a-family.md": garden,
    "docs/bare-towers.md": towers,
    "docs/benchmarking.md": given,
    "docs/many-devices.md": one_rank,
    "docs/methods.md": one_by_one,
    "docs/tuning.md": tuned,
}
