"""Attention that is edited beside the kernel: equal to VAR written out, whatever runs with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests import tiny
from tests.seam import kernels, oracle, plain_layers
from tests.seam.singles import check_answers
from tests.seam.talk import Talk
from tests.tiny import Prompt
from vlmcompress import ConfigError, UnsupportedInputError, patch
from vlmcompress.core.errors import ConfigTypeError
from vlmcompress.methods import create
from vlmcompress.methods.decoder.var import VAR

EXACT = 1e-5
FAMILIES = ("llava", "llava_siglip", "paligemma", "qwen2_vl", "glm4v", "aya_vision")
EDITS = "var(tau=2.0, layers=(1, 2))"
DROPS = "random_layer(layers=(1, 2)):0.25"
RAGGED = (Prompt(images=2, text=7), Prompt(images=1, text=9), Prompt(images=0, text=6))
SINGLE = (Prompt(images=2, text=8),)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.build(request.param)


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny.build("llava")


def plain(model: Any, **options: Any) -> plain_layers.PlainVAR:
    eager = type(model)(copy.deepcopy(model.config)).eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    return plain_layers.PlainVAR(eager, (1, 2), **options)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"rho": 0.9, "summ": 0.05, "p": 0.25}])
def test_editing_is_what_is_written_out(model: Any, options: dict[str, float]) -> None:
    call = tiny.inputs(model, SINGLE)
    full = model(**call).logits
    written = plain(model, **options)
    want = written.logits(call)
    with patch(model, create("var", tau=2.0, layers=(1, 2), **options)):
        logits = model(**call).logits
    assert written.edited > 20
    assert (logits - want).abs().max() < 2 * EXACT  # which is in float64
    assert (logits - full).abs().max() > 100 * EXACT


@torch.no_grad()
def test_decoding_goes_on_editing(llava: Any) -> None:
    call = tiny.inputs(llava, SINGLE)
    want = plain(llava).greedy(call, 5, tiny.special_ids(llava))
    with patch(llava, EDITS):
        ids = llava.generate(**call, **oracle.greedy(llava, 5))
    assert ids[0, -5:].tolist() == want


@torch.no_grad()
def test_steps_over_a_cache_equal_one_forward(model: Any) -> None:
    call = tiny.inputs(model, SINGLE)
    answer = torch.tensor([[9, 11, 8]])
    whole = {**call, "input_ids": torch.cat([call["input_ids"], answer], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in call:
            kind = int(model.config.model_type == "paligemma")  # its answers see causally
            whole[name] = torch.cat([call[name], torch.full_like(answer, kind)], 1)
    with patch(model, EDITS):
        want = model(**whole).logits[:, -3:]
        out = model(**call, use_cache=True)
        for i in range(3):
            step = {"input_ids": answer[:, i : i + 1], "past_key_values": out.past_key_values}
            out = model(**step, use_cache=True)
            assert (out.logits[:, -1] - want[:, i]).abs().max() < EXACT


@torch.no_grad()
def test_a_cache_gives_what_computing_anew_gives(model: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    for pipeline in (EDITS, f"{DROPS} | {EDITS}", f"divprune:0.5 | {DROPS} | {EDITS}"):
        with patch(model, pipeline):
            cached = model.generate(**call, **oracle.greedy(model))
            anew = model.generate(**call, **oracle.greedy(model), use_cache=False)
            static = model.generate(**call, **oracle.greedy(model), cache_implementation="static")
        assert torch.equal(cached, anew)
        assert torch.equal(cached, static)


COMPOSED = (
    EDITS,
    ["divprune:0.5", "fastv@1:0.5", EDITS],
    ["prunevid_llm@2:0.5", EDITS],
    ["sparsevlm(layers=(1, 2)):0.5", EDITS],
)


@torch.no_grad()
@pytest.mark.parametrize("method", COMPOSED, ids=str)
def test_a_padded_batch_is_its_samples(model: Any, method: Any) -> None:
    if "sparsevlm" in str(method) and model.config.model_type == "paligemma":
        method = EDITS  # rows that see later ones leave no place for merged ones
    call = tiny.inputs(model, RAGGED)
    with patch(model, method):
        check_answers(model, call)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_with_dropping_it_edits_what_is_left(family: str) -> None:
    model = tiny.build(family)
    call = tiny.inputs(model, SINGLE)
    with patch(model, [DROPS, EDITS], positions="original") as handle:
        logits = model(**call).logits
        absent = plain_layers.absent(model, call, handle.last)
    written = plain(model)
    with hidden_keys(written.model, absent):
        want = written.logits(call, absent)
    text = call["input_ids"] != model.config.image_token_id
    assert (logits - want)[text].abs().max() < EXACT
    assert written.edited > 20


def hidden_keys(model: Any, absent: Any) -> Any:
    """Nobody sees columns that are absent from a layer; by the additive masks of eager kernels."""
    stack = plain_layers.contextmanager(_hidden_keys)
    return stack(model, absent)


def _hidden_keys(model: Any, absent: Any) -> Any:
    handles = []
    for i, layer in enumerate(model.get_decoder().layers):

        def before(_: Any, args: Any, kwargs: Any, i: int = i) -> Any:
            length = args[0].shape[1]
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
            own = torch.eye(length, dtype=torch.bool)
            mask = mask.masked_fill(absent[i][:, None, None] & ~own, -torch.inf)
            return args, {**kwargs, "attention_mask": mask}

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["eager", "flex_attention", "fake_flash"])
def test_every_kernel_is_edited_alike(llava: Any, kernel: str) -> None:
    call = tiny.inputs(llava, RAGGED)
    valid = call["attention_mask"].bool()
    other = kernels.build("llava", kernel, torch.float32)
    with patch(llava, EDITS), patch(other, EDITS):
        assert (llava(**call).logits - other(**call).logits)[valid].abs().max() < EXACT
        ids = [m.generate(**call, **oracle.greedy(m)) for m in (llava, other)]
    assert torch.equal(*ids)


@torch.no_grad()
@pytest.mark.parametrize("method", [EDITS, [DROPS, EDITS]], ids=str)
@pytest.mark.parametrize("family", ["llava", "llava_siglip", "paligemma", "qwen2_vl", "aya_vision"])
def test_beams_take_their_marks_along(family: str, method: Any) -> None:
    model = tiny.build(family)
    call = tiny.inputs(model, RAGGED)
    beams = {**oracle.greedy(model, 6), "num_beams": 3}
    with patch(model, method):
        best = model.generate(**call, **beams)
        assert torch.equal(best, model.generate(**call, **beams, use_cache=False))


@torch.no_grad()
def test_rejected_drafts_leave_no_marks(llava: Any) -> None:
    call = tiny.inputs(llava, (Prompt(images=1, text=8),))
    with patch(llava, EDITS):
        plain_ids = llava.generate(**call, **oracle.greedy(llava, 12))
        looked_up = llava.generate(
            **call,
            **oracle.greedy(llava, 12),
            prompt_lookup_num_tokens=3,
            max_matching_ngram_size=1,
        )
    assert torch.equal(plain_ids, looked_up)


@torch.no_grad()
@pytest.mark.parametrize("method", [EDITS, [DROPS, EDITS]], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_three_turns_equal_one_run(family: str, method: Any) -> None:
    model = tiny.build(family)
    talk = Talk(model)
    with patch(model, method):
        talk.say(1, 8, seed=1)
        talk.answer()
        # What is dropped of a later image depends on the turn; Qwen2-VL counts it differently anew.
        later = int(method == EDITS and family == "llava")
        for images, seed in ((0, 2), (later, 3)):
            talk.say(images, 5, seed=seed)
            anew = talk.answer_uncached()
            assert torch.equal(talk.answer(), anew)


@torch.no_grad()
def test_an_earlier_turn_that_nobody_looked_at_is_refused(llava: Any) -> None:
    talk = Talk(llava)
    with patch(llava, EDITS):
        talk.say(0, 6, seed=1)
        talk.answer()
        talk.say(1, 6, seed=2)
        with pytest.raises(UnsupportedInputError, match="give the image with the first turn"):
            talk.answer()


@torch.no_grad()
def test_without_sinks_no_bit_changes(model: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    full, ids = model(**call).logits, model.generate(**call, **oracle.greedy(model))
    with patch(model, "var(tau=7.9, layers=(1, 2))"):
        assert torch.equal(model(**call).logits, full)
        assert torch.equal(model.generate(**call, **oracle.greedy(model)), ids)


@torch.no_grad()
def test_nothing_is_left_of_it(model: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    full, ids = model(**call).logits, model.generate(**call, **oracle.greedy(model))
    with patch(model, EDITS) as handle:
        assert not torch.equal(model(**call).logits, full)
        with handle.disabled():
            assert torch.equal(model(**call).logits, full)
    assert torch.equal(model(**call).logits, full)
    assert torch.equal(model.generate(**call, **oracle.greedy(model)), ids)
    assert not [m for m in model.modules() if any("vlmcompress" in k for k in m.__dict__)]


@torch.no_grad()
def test_a_cache_outlives_the_patch(llava: Any) -> None:
    call = tiny.inputs(llava, (Prompt(images=1, text=8),))
    with patch(llava, EDITS) as handle:
        cache = llava(**call, use_cache=True).past_key_values
        with handle.disabled():
            llava(input_ids=torch.tensor([[9]]), past_key_values=cache)
        edited = llava(input_ids=torch.tensor([[8]]), past_key_values=cache).logits
    assert llava(input_ids=torch.tensor([[7]]), past_key_values=cache).logits.isfinite().all()
    assert edited.isfinite().all()
    assert cache.get_seq_length() == call["input_ids"].shape[1] + 3


def test_gradients_pass_through_edited_rows(model: Any) -> None:
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
            with patch(model, EDITS):
                out = model(**call, labels=labels, use_cache=False)
                out.loss.backward()
            grads = [p.grad.clone() for p in model.get_decoder().layers.parameters()]
            seen[checkpointing] = (out.loss.detach(), *grads)
    finally:
        plain_layers.checkpoint(model, False)
        model.zero_grad()
        model.eval()
    for plain_value, checkpointed in zip(seen[False], seen[True], strict=True):
        torch.testing.assert_close(plain_value, checkpointed, atol=1e-6, rtol=1e-4)
    assert all(grad.isfinite().all() for grad in seen[False])


def test_random_attention_is_refused(llava: Any) -> None:
    call = tiny.inputs(llava, (Prompt(images=1, text=8),))
    attention = [layer.self_attn for layer in llava.get_decoder().layers]
    llava.train()
    try:
        for part in attention:
            part.attention_dropout = 0.5
        with patch(llava, EDITS), pytest.raises(UnsupportedInputError, match="attention_dropout"):
            llava(**call)
    finally:
        for part in attention:
            part.attention_dropout = 0.0
        llava.eval()


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("var", "smaller tau"),
        ("var(tau=2.0)", "name others"),
        ("var(tau=2.0)@3", "does not exist"),
        (f"{EDITS} | var(tau=3.0)@1", "name it once"),
        ("var(tau=2.0, rho=1.5)", "rho"),
        ("var(tau=2.0, p=-0.1)", "p is"),
        ("var(tau=2.0):0.5", "twice"),
        ("var(tau=2.0, layers=())", "at least one"),
    ],
)
def test_bad_options_say_what_to_do(llava: Any, method: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        patch(llava, method)
    assert "generate" not in llava.__dict__


def test_options_of_another_kind_are_refused() -> None:
    with pytest.raises(ConfigTypeError, match="tau"):
        VAR(tau="20")  # type: ignore[arg-type]
    with pytest.raises(ConfigTypeError, match="layers"):
        VAR(layers=3)  # type: ignore[arg-type]


def test_published_layers() -> None:
    assert VAR().edited_layers(32, 4096) == tuple(range(2, 31))
    assert VAR(layers=(-1, 0.5)).edited_layers(32, 4096) == (16, 31)


@pytest.mark.parametrize("seed", range(5))
def test_weights_still_sum_to_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 3, 7, 20, generator=generator).mul(2).softmax(-1)
    visual = torch.rand(2, 20, generator=generator) < 0.6
    sinks = torch.rand(2, 20, generator=generator) < 0.2
    method = VAR()
    edited, changed = method.edit(weights, visual, sinks)
    torch.testing.assert_close(edited.sum(-1), torch.ones(2, 3, 7))
    assert torch.equal(edited[~changed], weights[~changed])
    assert (changed <= method.centred(weights, visual, sinks)).all()
    there = sinks[:, None, None].expand_as(weights) & changed[..., None]
    torch.testing.assert_close(edited[there], 0.6 * weights[there])
    text = ~(visual | sinks)[:, None, None].expand_as(weights)
    assert torch.equal(edited[text], weights[text])
