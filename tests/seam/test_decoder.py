"""Methods inside the language model: equal to a full model in which dropped keys are hidden."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.seam import kernels, oracle
from tests.seam.reductions import keys_hidden
from tests.seam.singles import check_answers
from tests.tiny import Prompt
from vlmcompress import patch
from vlmcompress.core.costs import cache_bytes
from vlmcompress.core.errors import (
    CacheMismatchError,
    ConfigError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from vlmcompress.methods.decoder.uniform_layer import UniformLayer

EXACT = 1e-5
DROPS = "random_layer(layers=(1, 2)):0.25"
FAMILIES = (
    *("llava", "llava_siglip", "paligemma", "qwen2_vl", "qwen2_5_vl", "glm4v", "kimi_k25"),
    "aya_vision",
)
RAGGED = (Prompt(images=2, text=7), Prompt(images=1, text=9), Prompt(images=0, text=6))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.build(request.param)


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny.build("llava")


def hidden_columns(model: Any, call: Mapping[str, Tensor], record: Any) -> dict[int, Tensor]:
    """Visual columns that a recorded call did not take into each layer."""
    placeholders = call["input_ids"] == model.config.image_token_id
    out = {}
    for layer in range(len(record.layer_entrants)):
        kept, stays = torch.cat(record.kept_in(layer)), []
        start = 0
        for n, rows in zip(record.tokens_before, record.kept_in(layer), strict=True):
            stay = torch.zeros(n, dtype=torch.bool)
            stay[rows] = True
            stays.append(stay)
            start += n
        assert len(kept) == sum(int(s.sum()) for s in stays)
        columns = torch.zeros_like(placeholders)
        columns[placeholders] = ~torch.cat(stays)
        out[layer] = columns
    return out


@torch.no_grad()
@pytest.mark.parametrize("method", ["random_layer(layers=(1, 2)):0.25", "fastv@1:0.3"])
def test_dropping_is_hiding(model: Any, method: str) -> None:
    call = tiny.inputs(model, RAGGED)
    full = model(**call).logits
    with patch(model, method, positions="original") as handle:
        logits = model(**call).logits
        record = handle.last
    assert record is not None
    assert record.layer_tokens[0] == (2 * record.tokens_before[0], record.tokens_before[0], 0)
    assert sum(record.layer_tokens[-1]) < 0.4 * sum(record.layer_tokens[0])
    hidden = hidden_columns(model, call, record)
    with keys_hidden(model, hidden):
        want = model(**call).logits
    text = call["attention_mask"].bool() & (call["input_ids"] != model.config.image_token_id)
    assert (logits - want)[text].abs().max() < EXACT
    assert (logits - full)[text].abs().max() > 100 * EXACT
    dropped = hidden[len(record.layer_entrants) - 1]
    assert logits.shape == full.shape
    if "lm_head.bias" not in model.state_dict():
        assert logits[dropped].eq(0).all()


@torch.no_grad()
def test_keeping_all_changes_no_bit(model: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    full, ids = model(**call).logits, model.generate(**call, **oracle.greedy(model))
    with patch(model, "fastv@1:1.0 | pyramiddrop(layers=(1, 2)):1.0"):
        assert torch.equal(model(**call).logits, full)
        assert torch.equal(model.generate(**call, **oracle.greedy(model)), ids)
    assert torch.equal(model(**call).logits, full)
    assert not [m for m in model.modules() if any("vlmcompress" in k for k in m.__dict__)]
    assert all(type(layer).forward == layer.forward.__func__ for layer in decoder_layers(model))


def decoder_layers(model: Any) -> Sequence[Any]:
    return list(model.get_decoder().layers)


@torch.no_grad()
def test_a_cache_gives_what_computing_anew_gives(model: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    with patch(model, DROPS):
        cached = model.generate(**call, **oracle.greedy(model))
        anew = model.generate(**call, **oracle.greedy(model), use_cache=False)
        static = model.generate(**call, **oracle.greedy(model), cache_implementation="static")
    assert torch.equal(cached, anew)
    assert torch.equal(cached, static)


METHODS = ("fastv@1:0.3", "pyramiddrop(layers=(1, 2)):0.25", DROPS, "divprune:0.5 | fastv@2:0.5")


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_padded_batch_is_its_samples(model: Any, method: str) -> None:
    call = tiny.inputs(model, RAGGED)
    with patch(model, method):
        check_answers(model, call)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_the_cache_is_as_short_as_the_layers(model: Any, method: str) -> None:
    call = tiny.inputs(model, (Prompt(images=1, text=8),))
    full = cache_bytes(model(**call, use_cache=True).past_key_values)
    with patch(model, method) as handle:
        cache = model(**call, use_cache=True).past_key_values
        record = handle.last
    assert record is not None
    lengths = [attention for attention, _ in record.layer_lengths]
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    assert record.kv_bytes == cache_bytes(cache) < full
    per_column = full / (len(lengths) * call["input_ids"].shape[1])
    assert record.kv_bytes == per_column * sum(lengths)


@torch.no_grad()
def test_beams_and_samples_repeat_their_row(llava: Any) -> None:
    call = tiny.inputs(llava, RAGGED)
    with patch(llava, "pyramiddrop(layers=(1, 2)):0.25"):
        one = llava.generate(**call, **oracle.greedy(llava))
        several = llava.generate(
            **call, **oracle.greedy(llava), num_beams=3, num_return_sequences=2
        )
        check_answers(llava, call, num_beams=3)
    assert several.shape[0] == 2 * len(RAGGED)
    assert one.shape[0] == len(RAGGED)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_rejected_drafts_leave_nothing_in_short_layers(llava: Any, method: str) -> None:
    call = tiny.inputs(llava, (Prompt(images=1, text=8),))
    with patch(llava, method):
        plain = llava.generate(**call, **oracle.greedy(llava, 12))
        looked_up = llava.generate(
            **call,
            **oracle.greedy(llava, 12),
            prompt_lookup_num_tokens=3,
            max_matching_ngram_size=1,
        )
    assert torch.equal(plain, looked_up)


@torch.no_grad()
@pytest.mark.parametrize("method", [DROPS, "divprune:0.5 | random_layer@1:0.5"])
def test_three_turns_equal_one_run(model: Any, method: str) -> None:
    """Text after text over a returned cache; what was dropped was decided at the first turn."""
    call = tiny.inputs(model, (Prompt(images=1, text=8),))
    wanted = {**oracle.greedy(model, 3), "return_dict_in_generate": True}
    ids = call["input_ids"]
    with patch(model, method):
        out = model.generate(**call, **wanted)
        for _ in range(2):
            more = torch.tensor([[5, 6]])
            ids = torch.cat([out.sequences, more], 1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            out = model.generate(**turn, **wanted, past_key_values=out.past_key_values)
        whole = {**call, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in call:
                zeros = call[name].new_zeros(1, ids.shape[1] - call[name].shape[1])
                whole[name] = torch.cat([call[name], zeros], 1)
        if model.config.model_type == "paligemma":
            whole["token_type_ids"] = torch.cat(
                [call["token_type_ids"], 1 - zeros], 1
            )  # later turns see causally
        anew = model.generate(**whole, **wanted)
    assert torch.equal(out.sequences, anew.sequences)


def checkpoint(model: Any, on: bool) -> None:
    """Switch activation checkpointing, by its newer name where there is one."""
    name = "enable" if on else "disable"
    new = getattr(model, f"activation_checkpointing_{name}", None)
    (new or getattr(model, f"gradient_checkpointing_{name}"))()


def test_training_through_dropped_layers(model: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    labels = call["input_ids"].clone()
    labels[(call["attention_mask"] == 0) | (labels == model.config.image_token_id)] = -100
    model.train()
    try:
        losses = {}
        for checkpointing in (False, True):
            model.zero_grad()
            if checkpointing:
                checkpoint(model, True)
            with patch(model, DROPS):
                out = model(**call, labels=labels, use_cache=False)
                out.loss.backward()
            losses[checkpointing] = out.loss.item()
            grads = [p.grad for p in model.get_decoder().layers[-1].parameters()]
            assert all(g is not None and g.isfinite().all() for g in grads)
            assert any(g.abs().max() > 0 for g in grads)
    finally:
        checkpoint(model, False)
        model.zero_grad()
        model.eval()
    assert losses[True] == pytest.approx(losses[False], abs=1e-6)


@torch.no_grad()
def test_a_removed_patch_leaves_caches_that_still_decode(llava: Any) -> None:
    call = tiny.inputs(llava, (Prompt(images=1, text=8),))
    with patch(llava, DROPS) as handle:
        out = llava(**call, use_cache=True)
        with handle.disabled():
            step = llava(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)
    assert step.logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("crop", [True, False])
def test_a_cut_cache_does_not_change_what_layers_saw(llava: Any, crop: bool) -> None:
    """The report is about the prefill's attention, the bytes about what is left behind."""
    call = tiny.inputs(llava, [tiny.Prompt(images=1, text=7)])
    with patch(llava, f"prunevid_llm(crop={crop})@1:0.25") as handle:
        cache = llava(**call).past_key_values
        record = handle.last
    (n,) = record.tokens_before
    counts = [sum(row) for row in record.layer_tokens]
    assert counts == [n] + [round(0.25 * n)] * (len(counts) - 1)
    assert [len(record.kept_in(layer)[0]) for layer in range(len(counts))] == counts
    assert record.average_keep == sum(counts) / (len(counts) * n)
    text = call["input_ids"].shape[1] - n
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert held == [text + (counts[-1] if crop else seen) for seen in counts]


@torch.no_grad()
def test_a_cropped_cache_is_refused(llava: Any) -> None:
    call = tiny.inputs(llava, (Prompt(images=1, text=8),))
    with patch(llava, DROPS):
        cache = llava(**call, use_cache=True).past_key_values
        cache.crop(4 - cache.get_seq_length())
        with pytest.raises(CacheMismatchError, match="cropped"):
            llava(input_ids=torch.tensor([[5]]), past_key_values=cache)


@torch.no_grad()
def test_the_prompt_must_come_in_one_piece(llava: Any) -> None:
    call = tiny.inputs(llava, (Prompt(images=1, text=8),))
    with patch(llava, DROPS), pytest.raises(UnsupportedInputError, match="one piece"):
        llava.generate(**call, **oracle.greedy(llava), prefill_chunk_size=8)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("fastv@3:0.5", "does not exist"),
        ("fastv@0:0.5", "layer 0"),
        ("pyramiddrop(layers=(2, 1)):0.5", "ascend"),
        ("pyramiddrop(layers=(0.5, 0.6)):0.5", "different"),
        ("fastv@1", "no budget"),
        ("fastv(average_keep=0.5)@1:0.5", "twice"),
        ("fastv@1:auto", "inside"),
        ("fastv@1:0.5 | divprune:0.5", "order of the path"),
        ("pyramiddrop(layers=(1, 2), ratios=(0.25, 0.5))", "not grow"),
        ("pyramiddrop(layers=(1, 2), ratios=(0.5,))", "one ratio per layer"),
        ("fastv(average_keep=0.1)@2", "drop earlier"),
    ],
)
def test_bad_configurations_say_what_to_do(llava: Any, method: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        patch(llava, method)
    assert "generate" not in llava.__dict__


def test_renumbering_is_refused_where_positions_have_three_axes() -> None:
    with pytest.raises(ConfigError, match="original"):
        patch(tiny.build("qwen2_vl"), DROPS, positions="contiguous")


@torch.no_grad()
def test_an_active_sliding_window_is_refused() -> None:
    model = tiny.build("llava_pixtral")
    model.get_decoder().config.sliding_window = 8
    call = tiny.inputs(model, (Prompt(images=1, text=8),))
    with patch(model, DROPS), pytest.raises(UnsupportedInputError, match="sliding window"):
        model(**call)


def test_stacks_that_cannot_be_shortened_are_refused(llava: Any) -> None:
    layer = llava.get_decoder().layers[1]
    attention = layer.self_attn
    del layer.self_attn
    try:
        with pytest.raises(UnsupportedModelError, match="no attention"):
            patch(llava, DROPS)
    finally:
        layer.self_attn = attention


@torch.no_grad()
def test_a_failed_call_does_not_reach_the_next_use_of_the_layers(llava: Any) -> None:
    call = tiny.inputs(llava, (Prompt(images=1, text=8),))
    embedded = torch.randn(1, 12, llava.get_decoder().config.hidden_size)
    want = llava.get_decoder()(inputs_embeds=embedded).last_hidden_state

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with patch(llava, DROPS):
        llava(**call)
        assert torch.equal(llava.get_decoder()(inputs_embeds=embedded).last_hidden_state, want)
        broken = llava.get_decoder().layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            llava(**call)
        broken.remove()
        assert torch.equal(llava.get_decoder()(inputs_embeds=embedded).last_hidden_state, want)


@torch.no_grad()
def test_two_methods_may_act_at_one_place(llava: Any) -> None:
    """The second ranks by the same layer's attention what the first has left."""
    call = tiny.inputs(llava, RAGGED)
    with patch(llava, "random_layer(seed=3)@1:0.6 | fastv@1:0.2", positions="original") as handle:
        both = llava(**call).logits
        kept = handle.last.kept_in(1)
        handle.set(method="random_layer(seed=3)@1:0.6")
        llava(**call)
        first = handle.last.kept_in(1)
    assert [len(rows) for rows in first] > [len(rows) for rows in kept]
    assert all(
        set(late.tolist()) < set(early.tolist()) for late, early in zip(kept, first, strict=True)
    )
    assert both.isfinite().all()


@torch.no_grad()
def test_what_a_method_writes_down_is_handed_back(llava: Any, monkeypatch: Any) -> None:
    """Notes follow their rows through a site of another method."""
    seen = []
    plain = UniformLayer.reduce

    def writing(self: Any, site: int, state: Any, k: Tensor) -> Any:
        if state.notes is not None:
            seen.append((state.notes, state.ordinal))
        reduction = plain(self, site, state, k)
        return dataclasses.replace(reduction, notes=state.ordinal * 7)

    monkeypatch.setattr(UniformLayer, "reduce", writing)
    call = tiny.inputs(llava, RAGGED)
    with patch(llava, "uniform_layer(layers=(1, 2)):0.3 | random_layer@1:0.5"):
        llava(**call)
    ((notes, ordinal),) = seen
    assert torch.equal(notes, ordinal * 7)


@torch.no_grad()
def test_block_masks_of_prefixes_cannot_be_cut() -> None:
    model = kernels.build("paligemma", "flex_attention", torch.float32)
    call = tiny.inputs(model, (Prompt(images=1, text=8),))
    with patch(model, DROPS), pytest.raises(UnsupportedModelError, match="block masks"):
        model(**call)
