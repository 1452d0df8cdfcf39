"""TokenPacker, C-Abstractor and MQT in models: rows, training, budgets, files."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from tests.seam import oracle
from tests.seam.plain_learned import shake
from vlmcompress import ConfigError, patch
from vlmcompress.families import family_of
from vlmcompress.methods import create
from vlmcompress.methods.connector.mqt import MQT
from vlmcompress.methods.layouts import layout, load_released
from vlmcompress.methods.trained import cell_grid

NAMES = ("tokenpacker", "c_abstractor", "mqt")
#: Connectors that can be parted from the tower and some that cannot, tiles, mergers of patches.
FAMILIES = ("llava", "paligemma", "ovis2", "qwen2_vl", "llava_next", "aya_vision")
every_method = pytest.mark.parametrize("name", NAMES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def ask(family: str, prompts: Any = oracle.MIXED) -> tuple[Any, dict[str, Tensor]]:
    model = tiny.build(family)
    return model, tiny.inputs(model, prompts)


@every_method
@every_family
def test_answers_are_generated_and_the_model_comes_back(name: str, family: str):
    model, call = ask(family)
    before = model(**call).logits
    with patch(model, f"{name}:4") as handle:
        out = model.generate(**call, **oracle.greedy(model, 3))
        assert out.shape == (3, call["input_ids"].shape[1] + 3)
        views = [after // 4 for after in handle.last.tokens_after]
        assert [4 * v for v in views] == list(handle.last.tokens_after)
        assert all(v == 1 for v in views) or family == "llava_next"
        assert sum(handle.last.tokens_after) < sum(handle.last.tokens_before)
    assert torch.equal(model(**call).logits, before)


@every_method
@every_family
def test_every_part_learns(name: str, family: str):
    model, call = ask(family)
    call["labels"] = call["input_ids"]
    with patch(model, f"{name}:3") as handle:
        shake(handle.parts)
        model(**call).loss.backward()
        for part, parameter in handle.parts.named_parameters():
            assert parameter.grad is not None, part
            assert bool(parameter.grad.isfinite().all()), part
            assert bool(parameter.grad.ne(0).any()), part


def tower_states(model: Any, call: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What the connector of a LLaVA model reads, and the outputs of all tower layers, no [CLS]."""
    tower = family_of(model).tower_module(model.base_model)
    hidden = tower(call["pixel_values"], output_hidden_states=True).hidden_states
    outputs = [states[:, 1:] for states in hidden[1:]]
    return hidden[model.config.vision_feature_layer][:, 1:], outputs


@every_method
@torch.no_grad()
def test_rows_are_made_of_the_tower_and_replace_the_connectors(name: str):
    model, call = ask("llava", oracle.ONE)
    x, outputs = tower_states(model, call)
    options = {"layers": (0, -1)} if name == "tokenpacker" else {}
    with patch(model, create(name, **options), keep=6) as handle:
        parts, size = handle.parts, (math.isqrt(x.shape[1]),) * 2
        shake(parts)
        got = handle.encode(**call).encoded.output.pooler_output[0]
        if name == "tokenpacker":
            deep = torch.cat([outputs[0], outputs[-1]], -1)
            want = parts(x, deep, size, cell_grid(size, 6))
        elif name == "mqt":
            want, _ = parts(x, size, 6)
        else:
            want = parts(x, size, cell_grid(size, 6))
        torch.testing.assert_close(got.reshape(want.shape), want)
        assert want.shape == (1, 6, model.config.text_config.hidden_size)


@every_method
def test_budgets_may_vary_in_training(name: str):
    model, call = ask("llava", oracle.ONE)
    call["labels"] = call["input_ids"]
    with patch(model, name, keep=4) as handle:
        parts = handle.parts
        optimizer = torch.optim.SGD(parts.parameters(), lr=0.1)
        draw = random.Random(0)
        for _ in range(3):
            keep = draw.choice(MQT(max_tokens=16).training_counts)
            handle.set(keep=keep)
            assert handle.parts is parts
            optimizer.zero_grad()
            model(**call).loss.backward()
            optimizer.step()
            assert handle.last.tokens_after[0] <= keep


@every_method
def test_trained_weights_come_from_a_file_and_for_their_model_only(name: str, tmp_path: Path):
    model, call = ask("llava")
    path = tmp_path / "parts.safetensors"
    with patch(model, f"{name}:4") as handle:
        shake(handle.parts)
        handle.parts.save(path)
        wanted = model(**call).logits
    with patch(model, f"{name}(tokens=4, weights='{path}')"):
        assert torch.equal(model(**call).logits, wanted)
    with pytest.raises(ConfigError, match="made for"):
        patch(tiny.build("qwen2_vl"), f"{name}(tokens=4, weights='{path}')")


@every_method
def test_weights_of_the_released_layout_load_into_a_patched_model(name: str, tmp_path: Path):
    model, call = ask("llava")
    known = layout(name)
    options = "(faithful=True)" if name == "mqt" else ""
    with patch(model, f"{name}{options}:4") as handle:
        generator = torch.Generator().manual_seed(1)
        held = {
            known.prefix + key: torch.randn(value.shape, generator=generator) * 0.1
            for key, value in handle.parts.state_dict().items()
        }
        untrained = model(**call).logits
        save_file(held, str(tmp_path / "model.safetensors"))
        load_released(handle.parts, tmp_path)
        for key, value in handle.parts.state_dict().items():
            assert torch.equal(value, held[known.prefix + key])
        assert not torch.equal(model(**call).logits, untrained)


@every_method
def test_half_precision_models_train_parts_in_float32(name: str):
    model = tiny.build("llava", dtype=torch.bfloat16)
    call = tiny.inputs(model, oracle.MIXED)
    call["pixel_values"] = call["pixel_values"].bfloat16()
    call["labels"] = call["input_ids"]
    with patch(model, f"{name}:4") as handle:
        loss = model(**call).loss
        loss.backward()
        assert loss.isfinite()
        assert all(p.dtype == torch.float32 for p in handle.parts.parameters())
        assert all(p.grad is not None for p in handle.parts.parameters())
