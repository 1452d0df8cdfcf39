"""Tokens that pass by layers: equal to whole layers with their keys hidden and rows put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests import tiny
from tests.seam import oracle, plain_layers
from tests.seam.singles import check_answers
from tests.seam.talk import Talk
from tests.tiny import Prompt, configs
from vlmcompress import ConfigError, UnsupportedInputError, patch
from vlmcompress.core.costs import cache_bytes
from vlmcompress.core.errors import CheckpointError

EXACT = 1e-5
FAMILIES = ("llava", "llava_siglip", "paligemma", "qwen2_vl", "glm4v", "kimi_k25", "aya_vision")
ROUTES = "mod(layers=(1, 2)):0.4"
RAGGED = (Prompt(images=2, text=7), Prompt(images=1, text=9), Prompt(images=0, text=6))
SINGLE = (Prompt(images=2, text=8),)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.build(request.param)


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny.build("llava")


def trained(model: Any, spec: Any = ROUTES, **more: Any) -> Any:
    """A handle whose routers weigh tokens by numbers of some size."""
    handle = patch(model, spec, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parts.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return handle


@torch.no_grad()
def test_passing_by_is_hiding(model: Any) -> None:
    call = tiny.inputs(model, SINGLE)
    full = model(**call).logits
    with trained(model) as handle:
        logits, record = model(**call).logits, handle.last
        weights = {i: handle.parts.routers[str(i)].weight[0].clone() for i in (1, 2)}
    with plain_layers.routed(model, call, weights, 0.4, record.tokens_before[0]):
        want = model(**call).logits
    assert (logits - want).abs().max() < EXACT
    assert (logits - full).abs().max() > 100 * EXACT
    per_image = record.tokens_before[0]
    some = 2 * int(0.4 * per_image + 0.5)
    assert record.layer_tokens == ((2 * per_image,), (some,), (some,))


@torch.no_grad()
def test_caches_hold_what_was_worked_on(model: Any) -> None:
    call = tiny.inputs(model, SINGLE)
    full = cache_bytes(model(**call, use_cache=True).past_key_values)
    with trained(model) as handle:
        cache = model(**call, use_cache=True).past_key_values
        record = handle.last
    lengths = [attention for attention, _ in record.layer_lengths]
    assert lengths[1] == lengths[2] < lengths[0] == call["input_ids"].shape[1]
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    per_column = full / (len(lengths) * call["input_ids"].shape[1])
    assert record.kv_bytes == cache_bytes(cache) == per_column * sum(lengths)
    assert record.prefill_flops is None or record.prefill_flops < record.prefill_flops_before


@torch.no_grad()
@pytest.mark.parametrize("method", [ROUTES, ["divprune:0.5", "random_layer@2:0.5", "mod@1:0.4"]])
def test_a_cache_gives_what_computing_anew_gives(model: Any, method: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    with trained(model, method):
        cached = model.generate(**call, **oracle.greedy(model))
        anew = model.generate(**call, **oracle.greedy(model), use_cache=False)
        static = model.generate(**call, **oracle.greedy(model), cache_implementation="static")
    assert torch.equal(cached, anew)
    assert torch.equal(cached, static)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl", "aya_vision"])
def test_beams_repeat_their_row(family: str) -> None:
    model = tiny.build(family)
    call, beams = tiny.inputs(model, RAGGED), {**oracle.greedy(model), "num_beams": 3}
    with trained(model):
        best = model.generate(**call, **beams)
        assert torch.equal(best, model.generate(**call, **beams, use_cache=False))


COMPOSED = (
    ROUTES,
    ["divprune:0.5", "mod(layers=(1,)):0.3"],
    ["pyramiddrop(layers=(1,)):0.5", "mod(layers=(1, 2)):3"],
    ["mod(layers=(1,)):0.3", "var(tau=2.0, layers=(1, 2))", "early_exit(threshold=1.5)"],
)


@torch.no_grad()
@pytest.mark.parametrize("method", COMPOSED, ids=str)
def test_a_padded_batch_is_its_samples(model: Any, method: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    with trained(model, method):
        check_answers(model, call)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_three_turns_equal_one_run(family: str) -> None:
    model = tiny.build(family)
    talk = Talk(model)
    with trained(model):
        for images, seed in ((1, 1), (0, 2), (int(family == "llava"), 3)):
            talk.say(images, 6, seed=seed)
            anew = talk.answer_uncached()
            assert torch.equal(talk.answer(), anew)


@torch.no_grad()
def test_rejected_drafts_leave_nothing(llava: Any) -> None:
    call = tiny.inputs(llava, (Prompt(images=1, text=8),))
    with trained(llava):
        plain = llava.generate(**call, **oracle.greedy(llava, 12))
        drafted = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
        looked_up = llava.generate(**call, **oracle.greedy(llava, 12), **drafted)
    assert torch.equal(plain, looked_up)


def test_gradients_reach_the_routers(model: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    labels = call["input_ids"].clone()
    labels[(call["attention_mask"] == 0) | (labels == model.config.image_token_id)] = -100
    seen = {}
    model.train()
    try:
        for checkpointing in (False, True):
            if checkpointing:
                plain_layers.checkpoint(model, True)
            model.zero_grad()
            # What the last layer adds to visual rows is read by nothing but the row behind them.
            with trained(model, "mod(layers=(1,)):0.4") as handle:
                out = model(**call, labels=labels, use_cache=False)
                out.loss.backward()
                routers = [p.grad.clone() for p in handle.parts.parameters()]
            assert all(grad.abs().max() > 0 for grad in routers)
            grads = [p.grad.clone() for p in model.get_decoder().layers[0].parameters()]
            seen[checkpointing] = (out.loss.detach(), *routers, *grads)
    finally:
        plain_layers.checkpoint(model, False)
        model.zero_grad()
        model.eval()
    for plain, checkpointed in zip(seen[False], seen[True], strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-4)


def test_a_router_learns(llava: Any) -> None:
    """The gradient is that of the loss: some steps along it lower the loss."""
    call = tiny.inputs(llava, SINGLE)
    labels = call["input_ids"].clone()
    labels[labels == llava.config.image_token_id] = -100
    with trained(llava, "mod(layers=(1,)):0.4") as handle:
        optimiser = torch.optim.SGD(handle.parts.parameters(), lr=0.02)
        losses = []
        for _ in range(12):
            optimiser.zero_grad()
            loss = llava(**call, labels=labels).loss
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    llava.zero_grad()
    assert losses[-1] < losses[0] - 1e-3


@torch.no_grad()
def test_routers_come_from_their_file(llava: Any, tmp_path: Path) -> None:
    call, path = tiny.inputs(llava, SINGLE), tmp_path / "routers.safetensors"
    with trained(llava) as handle:
        want = llava(**call).logits
        handle.parts.save(path)
        untrained = handle.set(method="mod(layers=(1, 2), seed=5):0.4")
        assert not torch.equal(llava(**call).logits, want)
        assert untrained.parts is handle.parts
    with patch(llava, f"mod(layers=(1, 2), weights={str(path)!r}):0.4"):
        assert torch.equal(llava(**call).logits, want)
    with pytest.raises(ConfigError, match="layers"):
        patch(llava, f"mod(layers=(1,), weights={str(path)!r}):0.4")
    with pytest.raises(CheckpointError, match="no usable weights"):
        patch(llava, f"mod(layers=(1,), weights={str(tmp_path / 'none')!r}):0.4")


@torch.no_grad()
def test_nothing_is_left_of_it(model: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    full, ids = model(**call).logits, model.generate(**call, **oracle.greedy(model))
    with trained(model) as handle:
        assert not torch.equal(model(**call).logits, full)
        with handle.disabled():
            assert torch.equal(model(**call).logits, full)
    assert torch.equal(model(**call).logits, full)
    assert torch.equal(model.generate(**call, **oracle.greedy(model)), ids)
    assert not [m for m in model.modules() if any("vlmcompress" in k for k in m.__dict__)]


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("mod", "no budget"),
        ("mod@7:0.2", "does not exist"),
        ("mod(layers=(0, 2)):0.2", "from 1 on"),
        ("mod(layers=()):0.2", "at least one"),
        ("mod(seed=-1):0.2", "seed"),
        ("mod:0.2 | mod@2:0.4", "name it once"),
        ("mod:auto", "inside"),
        ("fastv@2:0.5 | mod@1:0.2", "looks at or acts in layer 1"),
        ("fitprune(schedule=(0.5, 0.25, 0.25)) | mod@1:0.2", "looks at or acts in layer"),
        ("mod:0.2 | divprune:0.5", "order of the path"),
    ],
)
def test_bad_options_say_what_to_do(llava: Any, method: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        patch(llava, method)
    assert "generate" not in llava.__dict__


def four_layers() -> Any:
    config = configs.CONFIGS["llava"]()
    config.text_config.num_hidden_layers = 4
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


@torch.no_grad()
def test_caches_that_rows_passed_by_are_not_cut() -> None:
    model = four_layers()
    call = tiny.inputs(model, SINGLE)
    cropping = trained(model, "mod@1:0.4 | prunevid_llm@3:0.5")
    with cropping, pytest.raises(UnsupportedInputError, match="crop=False"):
        model(**call)
    with trained(model, "mod@1:0.4 | prunevid_llm(crop=False)@3:0.5") as handle:
        model(**call)
        assert handle.last.layer_tokens == ((50,), (20,), (50,), (25,))
