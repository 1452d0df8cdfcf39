"""What methods look at: exact rows beside any kernel, in O(n) memory, touching nothing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from tests import tiny
from tests.seam import kernels, matrix, oracle
from vlmcompress import EvidenceError, MissingTextError, patch
from vlmcompress.families import family_of
from vlmcompress.families.towers import QueriesKeys
from vlmcompress.live.evidence import attention_received, cls_row
from vlmcompress.live.session import Session, current, running
from vlmcompress.live.timing import Stopwatch
from vlmcompress.methods import Needs, TokenPruner
from vlmcompress.methods.pipeline import build


@contextlib.contextmanager
def captured(model, *, cls_layers=(), received_layers=(), key_layers=()):
    """Evidence of one tower pass of a patched model, raw."""
    tower = family_of(model).tower(model.base_model)
    session = Session(
        Stopwatch(torch.device("cpu")),
        tower,
        frozenset(cls_layers),
        frozenset(received_layers),
        frozenset(key_layers),
    )
    with running(session):
        yield session


def attention_maps(family, call):
    """Maps of every tower layer under the eager kernel: {layer: list of [b, heads, n, n]}."""
    model = tiny.build(family, attn_implementation="eager")
    facts = family_of(model)
    layers = facts.tower(model.base_model).layers(facts.tower_module(model.base_model))
    attention = [layer.get_submodule(facts.tower(model.base_model).attention) for layer in layers]
    module = __import__(type(attention[0]).__module__, fromlist=["x"])
    maps, original = {}, module.eager_attention_forward

    def spy(this, *args, **kwargs):
        output, weights = original(this, *args, **kwargs)
        if this in attention:
            maps.setdefault(attention.index(this), []).append(weights)
        return output, weights

    module.eager_attention_forward = spy
    try:
        oracle.encode(model, call)
    finally:
        module.eager_attention_forward = original
    return maps


@pytest.mark.parametrize("family", matrix.CLS_FAMILIES)
@torch.no_grad()
def test_cls_rows_are_the_kernels_own(family):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED)
    maps = attention_maps(family, call)
    with patch(model, keep=0.5), captured(model, cls_layers=range(5)) as session:
        oracle.encode(model, call)
    assert sorted(session.cls_rows) == list(range(5))
    for layer, (rows,) in session.cls_rows.items():
        assert (rows - maps[layer][0][:, :, 0, 1:]).abs().max() < 1e-6


@pytest.mark.parametrize("family", matrix.READABLE_FAMILIES)
@torch.no_grad()
def test_attention_received_is_the_mean_over_queries(family):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED)
    maps = attention_maps(family, call)
    skip = int(family_of(model).tower(model.base_model).has_cls)
    with (
        patch(model, "received_attention", keep=0.5),
        captured(model, received_layers=range(5)) as session,
    ):
        oracle.encode(model, call)
    for layer, rows in session.received_rows.items():
        assert len(rows) == len(maps[layer])
        for got, weights in zip(rows, maps[layer], strict=True):
            want = weights[:, :, skip:, skip:].mean(2)
            assert (got - want).abs().max() < 1e-6


@torch.no_grad()
def test_keys_are_the_projections_outputs_without_cls():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.MIXED)
    seen = []
    attention = model.model.vision_tower.encoder.layers[3].self_attn
    attention.k_proj.register_forward_hook(lambda m, args, out: seen.append(out))
    with patch(model, keep=0.5), captured(model, key_layers=[3]) as session:
        oracle.encode(model, call)
    (keys,) = session.keys[3]
    assert torch.equal(keys, seen[0][:, 1:].unflatten(-1, (4, 8)))


@dataclass(frozen=True)
class ReadsTheQuestion(TokenPruner):
    name: ClassVar[str] = "reads_the_question"

    def needs(self):
        return Needs(text=True)

    def score(self, tokens):
        return tokens.evidence.text


def test_methods_that_read_the_question_need_a_clip_model():
    with pytest.raises(MissingTextError, match=r"read\(s\) the question: pass patch"):
        patch(tiny.build("llava"), ReadsTheQuestion(), keep=0.5)


def test_blocks_of_queries_do_not_change_the_mean():
    q, k = torch.randn(2, 3, 150, 8).unbind(0)[0], torch.randn(3, 150, 8)
    weights = (q @ k.transpose(-1, -2) * 0.3).softmax(-1)
    got = attention_received(QueriesKeys(q[None], k[None], 0.3))
    assert (got[0] - weights.mean(1)).abs().max() < 1e-6


class Largest(TorchDispatchMode):
    """The most elements any tensor made inside had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("n", [577, 2305])
def test_no_square_map_is_ever_made(n):
    heads, width = 16, 64
    qk = QueriesKeys(*torch.randn(2, 1, heads, n, width).unbind(0), width**-0.5)
    with Largest() as row:
        cls_row(qk)
    assert row.elements <= heads * n * width
    with Largest() as received:
        attention_received(qk, skip=1)
    assert received.elements <= heads * n * 64 < heads * n * n / 8


@torch.no_grad()
def test_bfloat16_towers_are_scored_in_float32():
    model = tiny.build("llava", dtype=torch.bfloat16)
    call = tiny.inputs(model, oracle.ONE)
    call["pixel_values"] = call["pixel_values"].bfloat16()
    with patch(model, keep=0.5), captured(model, cls_layers=[3]) as session:
        oracle.encode(model, call)
    assert session.cls_rows[3][0].dtype == torch.float32


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_what_the_connector_reads_stays_bit_equal(family):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.MIXED)
    want = oracle.features(model, call)
    with patch(model, keep=0.25) as handle:
        kept = handle.encode(**call).encoded
        # Same rows, in a smaller matrix product; the tower itself must not differ by a bit.
        with handle.disabled():
            again = oracle.features(model, call)
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    short = kept.output.pooler_output
    for full, rows, got in zip(want, kept.kept, short, strict=True):
        assert (full[rows] - got).abs().max() < 1e-5


@torch.no_grad()
def test_connector_input_is_bit_equal_under_a_pass():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.MIXED)
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].clone())
    )
    oracle.encode(model, call)
    with patch(model, keep=0.25) as handle:
        kept = handle.encode(**call).encoded.kept
    # The test's hook stands before ours, so it saw the full input both times.
    assert torch.equal(seen[0], seen[1])
    assert len(kept[0]) < seen[0].shape[1]


FLASH_CALLS = []


def _counted_flash(module, query, key, value, attention_mask=None, **kwargs):
    """The flash path, which gives no weights and takes no masks of four dimensions."""
    assert attention_mask is None or attention_mask.ndim == 2
    FLASH_CALLS.append(type(module).__name__)
    return kernels.fake_flash(module, query, key, value, attention_mask, **kwargs)


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl"])
@torch.no_grad()
def test_a_flash_kernel_in_the_tower_is_used_and_never_replaced(family):
    AttentionInterface.register("counted_flash", _counted_flash)
    AttentionMaskInterface.register("counted_flash", flash_attention_mask)
    sdpa, model = tiny.build(family), tiny.build(family)
    tower = family_of(model).tower_module(model.base_model)
    tower.config._attn_implementation = "counted_flash"
    call = tiny.inputs(model, oracle.ONE)
    with patch(sdpa, keep=0.25) as a, patch(model, keep=0.25) as b:
        FLASH_CALLS.clear()
        left, right = sdpa(**call).logits, model(**call).logits
        calls = len(FLASH_CALLS)
        assert tower.config._attn_implementation == "counted_flash"
        assert torch.equal(a.kept[0], b.kept[0])
    layers = len(family_of(model).tower(model.base_model).layers(tower))
    unread = 1 if family == "llava" else 0
    assert calls == layers - unread
    assert (left - right).abs().max() < 1e-5


@torch.no_grad()
def test_unread_tower_layers_are_skipped_only_in_a_pass():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    last = model.model.vision_tower.encoder.layers[-1]
    ran = []
    last.mlp.register_forward_hook(lambda *args: ran.append(1))
    want = model.model.vision_tower(call["pixel_values"]).last_hidden_state
    with patch(model, keep=0.25) as handle:
        ran.clear()
        model(**call)
        assert ran == []
        assert handle.last.skipped_layers == 1
        # A caller who asks for the tower's own output gets it.
        assert torch.equal(model.model.vision_tower(call["pixel_values"]).last_hidden_state, want)
        assert ran == [1]
        # A method that reads the last layer makes it run.
        handle.set(method="fastervlm", keep=0.25)
        model(**call)
        assert ran == [1]
        from vlmcompress.methods import create

        handle.set(method=create("fastervlm", layer=-1), keep=0.25)
        model(**call)
        assert ran == [1, 1]


@torch.no_grad()
def test_a_call_that_reads_another_layer_is_obeyed():
    model = tiny.build("llava")
    call = {**tiny.inputs(model, oracle.ONE), "vision_feature_layer": -1}
    with patch(model, keep=1.0):
        compressed = model(**call).logits
    assert torch.equal(compressed, model(**call).logits)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_projections_replaced_by_lora_are_followed():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    handle = patch(model, "fastervlm", keep=0.25)
    peft = get_peft_model(
        model, LoraConfig(target_modules=r".*vision_tower.*\.(q|k)_proj", init_lora_weights=False)
    )
    with captured(model, cls_layers=[4]) as session:
        handle._state.evidence.refresh(model.model.vision_tower.encoder.layers)
        oracle.encode(model, call)
    handle.remove()
    peft.eval()
    model.model.vision_tower.config._attn_implementation = "eager"
    layer = model.model.vision_tower.encoder.layers[4].self_attn
    maps = []
    layer.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    oracle.encode(model, call)
    assert (session.cls_rows[4][0] - maps[0][:, :, 0, 1:]).abs().max() < 1e-5


def test_hooks_do_nothing_outside_a_pass():
    assert current() is None


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_vl"])
def test_cls_methods_are_refused_where_there_is_no_cls(family):
    model = tiny.build(family)
    with pytest.raises(EvidenceError, match=r"no \[CLS\]"):
        patch(model, "vtc_cls", keep=0.1)
    assert not [k for k in model.__dict__ if "vlmcompress" in k]


def test_attention_methods_are_refused_where_it_cannot_be_read():
    with pytest.raises(EvidenceError, match="divprune"):
        patch(tiny.build("llava_pixtral"), "received_attention", keep=0.1)


def test_the_default_method_fits_the_tower():
    assert build(None, 0.1).config.stages[0].method == "vtc_cls"
    for family, want in [
        ("llava", "vtc_cls"),
        ("paligemma", "received_attention"),
        ("llava_pixtral", "divprune"),
    ]:
        with patch(tiny.build(family), keep=0.5) as handle:
            assert handle.config.stages[0].method == want
            assert "chosen by default" in str(handle.report)
