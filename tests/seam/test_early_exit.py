"""Leaving early: equal to a model whose later layers add nothing, caches included."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity
from typer.testing import CliRunner

from tests import tiny
from tests.seam import oracle, plain_layers
from tests.seam.talk import Talk
from tests.tiny import Prompt
from tests.units import QUICK
from vlmcompress import ConfigError, UnsupportedInputError, calibrate, patch
from vlmcompress.cli import app
from vlmcompress.core.costs import cache_bytes
from vlmcompress.core.errors import ConfigTypeError, EvidenceError
from vlmcompress.methods.decoder.exiting import LayerExit
from vlmcompress.methods.ops.exits import NEVER, Passage, fit_threshold
from vlmcompress.reference.weights import load as load_reference

EXACT = 1e-5
FAMILIES = ("llava", "llava_siglip", "paligemma", "qwen2_vl", "glm4v", "aya_vision")
RAGGED = (Prompt(images=2, text=7), Prompt(images=1, text=9), Prompt(images=0, text=6))
SINGLE = (Prompt(images=1, text=8),)
BEHIND_FIRST = "early_exit(threshold=-1)"
NO_EXIT = "early_exit(threshold=1.01)"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.build(request.param)


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny.build("llava")


def layers(model: Any) -> Any:
    return model.get_decoder().layers


def ending(model: Any, last: int) -> Any:
    return plain_layers.ending(model, layers, last, ("self_attn.o_proj", "mlp.down_proj"))


@dataclass(frozen=True)
class Scripted(LayerExit):
    """Leaves each forward behind the layer that a script names."""

    name: ClassVar[str] = "scripted"

    def __post_init__(self) -> None:
        object.__setattr__(self, "script", iter(()))

    def follow(self, script: list[int]) -> Scripted:
        """Use this script from the next forward on."""
        object.__setattr__(self, "script", self._forwards(script))
        return self

    def _forwards(self, script: list[int]) -> Iterator[bool]:
        for last in script:
            for layer in range(min(last, 1) + 1):  # of three; nobody asks behind the last one
                yield layer == last

    def leaves(self, layer: int, depth: int, before: Tensor, after: Tensor) -> Tensor:
        """By the script."""
        return torch.full((len(before),), next(vars(self)["script"]))


@torch.no_grad()
def test_never_leaving_changes_no_bit(model: Any) -> None:
    call = tiny.inputs(model, RAGGED)
    full, ids = model(**call).logits, model.generate(**call, **oracle.greedy(model))
    with patch(model, NO_EXIT) as handle:
        assert torch.equal(model(**call).logits, full)
        assert torch.equal(model.generate(**call, **oracle.greedy(model)), ids)
        depth = len(layers(model))
        assert set(handle.last.layers_run) == {depth}
        assert handle.last.prefill_flops == handle.last.prefill_flops_before
    assert torch.equal(model(**call).logits, full)
    assert not [m for m in model.modules() if any("vlmcompress" in k for k in m.__dict__)]


@torch.no_grad()
@pytest.mark.parametrize("last", [0, 1])
def test_later_layers_add_nothing_and_keep_their_caches(model: Any, last: int) -> None:
    call = tiny.inputs(model, RAGGED)
    short, full = ending(model, last), model(**call).logits
    want = short(**call, use_cache=True)
    with patch(model, f"early_exit(threshold=-1, first={last})") as handle:
        got = model(**call, use_cache=True)
        ids = model.generate(**call, **oracle.greedy(model))
        static = model.generate(**call, **oracle.greedy(model), cache_implementation="static")
        anew = model.generate(**call, **oracle.greedy(model), use_cache=False)
        record = handle.last
    there = call["attention_mask"].bool()
    assert (got.logits - want.logits)[there].abs().max() < EXACT
    assert (got.logits - full)[there].abs().max() > 100 * EXACT
    for mine, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            a, b = (getattr(layer, name).transpose(1, 2)[there] for layer in (mine, theirs))
            assert (a - b).abs().max() < EXACT
    assert cache_bytes(got.past_key_values) == cache_bytes(want.past_key_values)
    assert torch.equal(ids, short.generate(**call, **oracle.greedy(short)))
    assert torch.equal(ids, anew)
    assert torch.equal(ids, static)
    assert record.layers_run[0] == last + 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("script", "dropping"),
    [
        ([0, 2, 1, 2], False),
        ([2, 0, 2, 1], False),
        ([1, 1, 0, 2], False),
        ([2, 0, 2, 1], True),
        ([1, 1, 0, 2], True),
    ],
)
def test_each_forward_decides_for_itself(llava: Any, script: list[int], dropping: bool) -> None:
    """Forwards that leave and forwards that do not, over one cache."""
    call = tiny.inputs(llava, SINGLE)
    steps = torch.tensor([[9, 11, 8]])
    method = Scripted().follow([*script])
    before = "random_layer@1:0.5" if dropping else "uniform:1.0"
    with patch(llava, [before, method]) as handle:
        got = [llava(**call, use_cache=True)]
        cache = got[0].past_key_values
        for i in range(3):
            step = {"input_ids": steps[:, i : i + 1], "past_key_values": cache}
            got.append(llava(**step, use_cache=True))
        assert list(handle.last.layers_run) == [last + 1 for last in script]
    cache = None
    for i, last in enumerate(script):
        part = ending(llava, last)
        step = call if i == 0 else {"input_ids": steps[:, i - 1 : i], "past_key_values": cache}
        with patch(part, before):
            want = part(**step, use_cache=True)
        cache = want.past_key_values
        assert (got[i].logits - want.logits).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_it_leaves_where_rows_no_longer_turn(model: Any, seed: int) -> None:
    call = tiny.inputs(model, (Prompt(images=1, text=5 + seed), Prompt(images=2, text=9)))
    similar = similarities(model, call)
    depth = len(layers(model))
    for threshold in sorted({*similar.flatten().tolist()}):
        threshold -= 1e-4
        agreeing = [i for i in range(depth) if bool((similar[i] >= threshold).all())]
        want = (agreeing[0] if agreeing else depth - 1) + 1
        with patch(model, f"early_exit(threshold={threshold})") as handle:
            model(**call)
            assert handle.last.layers_run == (want,)


def similarities(model: Any, call: Any) -> Tensor:
    """[depth, B] cosine of the last row before and behind each layer, by hooks of our own."""
    columns = torch.arange(call["attention_mask"].shape[1])
    last = torch.where(call["attention_mask"].bool(), columns, 0).amax(1)
    rows, found = torch.arange(len(last)), []

    def look(_: Any, args: Any, output: Tensor) -> None:
        found.append(cosine_similarity(args[0][rows, last], output[rows, last], dim=-1))

    hooks = [layer.register_forward_hook(look) for layer in layers(model)]
    model(**call)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@torch.no_grad()
def test_beams_and_turns(llava: Any) -> None:
    """Where all forwards leave behind the same layer, nothing depends on how they are cut."""
    call = tiny.inputs(llava, RAGGED)
    beams = {**oracle.greedy(llava), "num_beams": 3}
    talk = Talk(llava)
    with patch(llava, BEHIND_FIRST):
        best = llava.generate(**call, **beams)
        assert torch.equal(best, llava.generate(**call, **beams, use_cache=False))
        batch = llava.generate(**call, **oracle.greedy(llava))
        for b in range(len(RAGGED)):
            per_image = tiny.tokens_per_image(llava)
            alone = oracle.row(call, b, llava.config.image_token_id, per_image)
            if RAGGED[b].images:
                ids = llava.generate(**alone, **oracle.greedy(llava))
                assert torch.equal(batch[b, -5:], ids[0, -5:])
        for images, seed in ((1, 1), (0, 2), (1, 3)):
            talk.say(images, 6, seed=seed)
            anew = talk.answer_uncached()
            assert torch.equal(talk.answer(), anew)


@torch.no_grad()
def test_reports_say_what_was_run(llava: Any) -> None:
    call = tiny.inputs(llava, SINGLE)
    with patch(llava, BEHIND_FIRST) as handle:
        llava.generate(**call, **oracle.greedy(llava, 4))
        record, text = handle.last, str(handle.report)
    assert record.layers_run == (1, 1, 1, 1)
    assert "layers run: 1 of 3 in prefill, 1.0 on average after it" in text
    assert record.layer_tokens[1:] == ((0,), (0,))
    # One layer whole, and the keys and values of two more.
    length, config = record.short_length, llava.config.text_config
    kv = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    logits = 2 * config.hidden_size * config.vocab_size
    one = (record.prefill_flops_before - logits) // 3
    assert record.prefill_flops == one + logits + 2 * length * 2 * config.hidden_size * 2 * kv


@torch.no_grad()
def test_nothing_but_keys_and_values_is_computed(llava: Any) -> None:
    """Behind the exit no MLP runs, no kernel, and the query projection sees one row at most."""
    call, seen = tiny.inputs(llava, SINGLE), []
    last = layers(llava)[-1]
    watched = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
    with patch(llava, BEHIND_FIRST):
        hooks = [
            last.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: seen.append((name, args[0].shape[1]))
            )
            for name in watched
        ]
        llava(**call, use_cache=True)
        cached = dict(seen)
        seen.clear()
        llava(**call, use_cache=False)
        for hook in hooks:
            hook.remove()
    assert cached == {
        "self_attn.q_proj": 1,
        "self_attn.k_proj": call["input_ids"].shape[1],
        "self_attn.o_proj": 1,
    }
    assert seen == []


@torch.no_grad()
def test_later_sites_do_not_act(llava: Any) -> None:
    call = tiny.inputs(llava, SINGLE)
    with patch(llava, ["fastv@1:0.5", "random_layer@2:0.2", "early_exit(threshold=-1, first=1)"]):
        cache = llava(**call, use_cache=True).past_key_values
    n = call["input_ids"].shape[1]
    assert [layer.get_seq_length() for layer in cache.layers] == [n, n - 12, n - 12]


def test_training_is_refused(llava: Any) -> None:
    call = tiny.inputs(llava, SINGLE)
    llava.train()
    try:
        for method in (BEHIND_FIRST, "early_exit_tower"):
            with patch(llava, method) as handle:
                with pytest.raises(UnsupportedInputError, match=r"model\.eval"):
                    llava(**call)
                with handle.disabled():
                    llava(**call)
    finally:
        llava.eval()


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("early_exit(threshold=3)", "threshold"),
        ("early_exit(first=1.5)", "share of depth"),
        ("early_exit(first=5)", "does not exist"),
        ("early_exit:0.5", "twice"),
        ("early_exit@1", "names a layer"),
        ("early_exit | early_exit(threshold=0.5)", "name it once"),
        ("early_exit_tower(first=9)", "does not exist"),
        ("early_exit_tower:0.5", "twice"),
        ("early_exit | divprune:0.5", "order of the path"),
    ],
)
def test_bad_options_say_what_to_do(llava: Any, method: str, match: str) -> None:
    with pytest.raises((ConfigError, ConfigTypeError), match=match):
        patch(llava, method)
    assert "generate" not in llava.__dict__


# --- the tower ------------------------------------------------------------------------------------

TOWERS = ("llava", "llava_siglip", "paligemma", "aya_vision")


def blocks(model: Any) -> Any:
    tower = model.base_model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_that_ends_early(family: str) -> None:
    model = tiny.build(family)
    call = tiny.inputs(model, RAGGED)
    full = model(**call).logits
    with patch(model, "early_exit_tower(threshold=1.01)"):
        assert torch.equal(model(**call).logits, full)
    for last in (0, 2):
        short = plain_layers.ending(model, blocks, last, ("self_attn.out_proj", "mlp.fc2"))
        ran: list[Any] = []
        hooks = [
            b.mlp.register_forward_hook(lambda m, *_, ran=ran: ran.append(m)) for b in blocks(model)
        ]
        with patch(model, f"early_exit_tower(threshold=-1, first={last})") as handle:
            logits = model(**call).logits
            assert handle.last.tower_run == last + 1
            assert f"run before patches left: {last + 1}" in str(handle.report)
        for hook in hooks:
            hook.remove()
        assert len(ran) == last + 1
        assert (logits - short(**call).logits).abs().max() < EXACT
    assert torch.equal(model(**call).logits, full)


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_is_left_where_patches_no_longer_turn(family: str) -> None:
    model = tiny.build(family)
    call = tiny.inputs(model, RAGGED)
    found = []

    def look(_: Any, args: Any, output: Any) -> None:
        first = int(family == "llava")
        found.append(cosine_similarity(args[0], output, dim=-1)[:, first:].mean(1).min())

    hooks = [block.register_forward_hook(look) for block in blocks(model)]
    model(**call)
    for hook in hooks:
        hook.remove()
    used = len(found) - int(family == "llava")
    for threshold in sorted(float(x) - 1e-4 for x in found[:used]):
        reached = [i for i in range(used) if float(found[i]) >= threshold]
        with patch(model, f"early_exit_tower(threshold={threshold}) | divprune:0.5") as handle:
            model(**call)
            assert handle.last.tower_run == (reached[0] if reached else used - 1) + 1
            assert handle.last.tokens_after[0] < handle.last.tokens_before[0]


def test_attention_that_may_not_be_computed_is_refused(llava: Any) -> None:
    with pytest.raises(EvidenceError, match="may leave the tower before"):
        patch(llava, "early_exit_tower | vtc_cls:0.5")


# --- calibration ----------------------------------------------------------------------------------


def outcome(passages: list[Passage], threshold: float, first: int) -> tuple[float, float]:
    """Mean share of layers and agreement, one pass after the other."""
    layers_run, agree = [], []
    for passage in passages:
        depth = len(passage.similar)
        leave = depth - 1
        for i in range(first, depth - 1):
            if float(passage.similar[i]) >= threshold:
                leave = i
                break
        layers_run.append((leave + 1) / depth)
        agree.append(bool(passage.same[leave]))
    return sum(layers_run) / len(passages), sum(agree) / len(passages)


def passages_of(seed: int, n: int, depth: int) -> list[Passage]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        same = torch.rand(depth, generator=generator) < torch.linspace(0.2, 1.5, depth)
        same[-1] = True
        found.append(Passage(torch.rand(depth, generator=generator), same))
    return found


@QUICK
@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 9),
    depth=st.integers(1, 8),
    wanted=st.floats(0, 1),
    data=st.data(),
)
def test_no_threshold_is_better(
    seed: int, n: int, depth: int, wanted: float, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, depth - 1))
    passages = passages_of(seed, n, depth)
    tried = [-1.0, NEVER, *torch.linspace(0, 1, 150).tolist()]
    tried += [float(x) for p in passages for x in p.similar]
    outcomes = [outcome(passages, threshold, first) for threshold in tried]
    agreeing = fit_threshold(passages, first=first, agreement=wanted)
    share, agreement = outcome(passages, agreeing.threshold, first)
    assert (share, agreement) == pytest.approx((agreeing.layers, agreeing.agreement))
    assert agreement >= wanted
    assert share <= min(s for s, a in outcomes if a >= wanted) + 1e-9
    if min(s for s, _ in outcomes) > wanted:
        with pytest.raises(ConfigError, match="Allow more"):
            fit_threshold(passages, first=first, layers=wanted)
        return
    within = fit_threshold(passages, first=first, layers=wanted)
    share, agreement = outcome(passages, within.threshold, first)
    assert share <= wanted
    assert agreement >= max(a for s, a in outcomes if s <= wanted) - 1e-9


def test_one_wish_at_a_time() -> None:
    passages = passages_of(0, 2, 4)
    with pytest.raises(ConfigError, match="one of them"):
        fit_threshold(passages)
    with pytest.raises(ConfigError, match="one of them"):
        fit_threshold(passages, layers=0.5, agreement=0.5)
    with pytest.raises(ConfigError, match="0 passes"):
        fit_threshold([], layers=0.5)
    with pytest.raises(ConfigError, match="agreement"):
        fit_threshold(passages, agreement=1.5)


@pytest.mark.parametrize("where", ["decoder", "tower"])
def test_a_calibrated_threshold_does_what_was_promised(where: str) -> None:
    from vlmcompress.reference.data import samples

    model, processor = load_reference()
    prompts = [(sample.image, sample.question) for sample in samples("train", 6)]
    never = calibrate.early_exit(model, processor, prompts, where=where, agreement=1.0)
    assert never.agreement == 1.0
    found = calibrate.early_exit(model, processor, prompts, where=where, layers=0.7)
    assert found.layers <= 0.7
    name = "early_exit_tower" if where == "tower" else "early_exit"
    own, ran, same = [], [], []
    for image, question in prompts:
        text = calibrate.prompt_of(processor, question)
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.no_grad():
            own.append(int(model(**inputs).logits[0, -1].argmax()))
            with patch(model, f"{name}(threshold={found.threshold!r})") as handle:
                same.append(int(model(**inputs).logits[0, -1].argmax()) == own[-1])
                last = handle.last
        ran.append(last.tower_run if where == "tower" else last.layers_run[0])
    depth = round(sum(ran) / len(ran) / found.layers)
    assert sum(ran) / len(ran) == pytest.approx(found.layers * depth)
    assert sum(same) / len(same) == pytest.approx(found.agreement)


def test_the_command(tmp_path: Any) -> None:
    out = tmp_path / "exit.json"
    options = ["--layers", "0.7", "--samples", "3", "--tokens", "2", "--out", str(out)]
    result = CliRunner().invoke(app, ["calibrate", "early_exit", *options])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["layers"] <= 0.7
    assert written["spec"] in result.output
    model, _ = load_reference()
    patch(copy.deepcopy(model), written["spec"]).remove()
