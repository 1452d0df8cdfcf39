"""Comparisons: patched with an integration against patched without, and against unpatched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests import tiny
from tests.seam import oracle
from tests.tiny import configs
from vlmcompress import patch

KEEP = 0.25


class Seen(NamedTuple):
    """What a model does with a prompt: greedy ids and logits."""

    ids: Tensor
    logits: Tensor


def families(*names: Any) -> pytest.MarkDecorator:
    """Run a test on these families; the support table names them."""
    return pytest.mark.parametrize("family", names)


THREE = families("llava", "paligemma", "qwen2_vl")


def sized(family: str, vision: Mapping[str, int], text: Mapping[str, int]) -> Any:
    """A random model of a family whose two configurations are changed where they have the names."""
    config = configs.CONFIGS[family]()
    for part, sizes in ((config.vision_config, vision), (config.text_config, text)):
        for name in sizes.keys() & vars(part).keys():
            setattr(part, name, sizes[name])
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tower(model: Any) -> tuple[str, Any]:
    """(name in the base model, module) of the vision tower."""
    name = "visual" if hasattr(model.model, "visual") else "vision_tower"
    return name, getattr(model.model, name)


@torch.no_grad()
def seen(model: Any, call: Mapping[str, Tensor], **options: Any) -> Seen:
    """Ids of a greedy generate and logits of a plain forward."""
    arguments = {**oracle.greedy(model), **options}
    return Seen(model.generate(**call, **arguments), model(**call).logits)


def patched(model: Any, call: Mapping[str, Tensor], keep: float = KEEP, **options: Any) -> Seen:
    """The same while the model is patched."""
    with patch(model, keep=keep):
        return seen(model, call, **options)


def assert_same(got: Seen, want: Seen, tolerance: float = 0.0) -> None:
    """Equal ids, and logits that differ by at most the tolerance."""
    assert torch.equal(got.ids, want.ids)
    assert (got.logits - want.logits).abs().max() <= tolerance


def labelled(call: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The call with labels on its text; the first token, which nothing predicts, left out."""
    labels = call["input_ids"].clone()
    labels[(labels >= 100) | ~call["attention_mask"].bool()] = -100
    labels[:, 0] = -100
    return {**call, "labels": labels}


@torch.no_grad()
def generated_from_hand_cut(model: Any, call: Mapping[str, Tensor], **options: Any) -> Tensor:
    """New ids of the unpatched model on the prompt that was cut by hand as the patch cuts it."""
    with patch(model, keep=KEEP, positions="contiguous") as handle:
        short = handle.encode(**call)["image"].pooler_output
        model(**call)
        kept = handle.kept
    cut = oracle.cut(model, call, kept, list(short))
    out = model.generate(**cut, **options)
    return out[:, cut["input_ids"].shape[1] :]


@torch.no_grad()
def generated_when_patched(model: Any, call: Mapping[str, Tensor], **options: Any) -> Tensor:
    """New ids of the patched model, which returned the caller's prompt before them."""
    with patch(model, keep=KEEP, positions="contiguous"):
        out = model.generate(**call, **options)
    length = call["input_ids"].shape[1]
    copies = len(out) // len(call["input_ids"])
    assert torch.equal(out[:, :length], call["input_ids"].repeat_interleave(copies, 0))
    return out[:, length:]


def mixed(model: Any) -> dict[str, Tensor]:
    """A padded batch: two images, one, none."""
    return tiny.inputs(model, oracle.MIXED)


def one(model: Any) -> dict[str, Tensor]:
    """One prompt with one image."""
    return tiny.inputs(model, oracle.ONE)
