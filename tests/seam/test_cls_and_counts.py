"""[CLS] in full width and carried along, counts that depend on content, orders, NaN."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.seam import checks, equalities, matrix, oracle
from tests.seam.equalities import world
from vlmcompress import ConfigError, EvidenceError, UnsupportedInputError, patch
from vlmcompress.families import family_of
from vlmcompress.families.towers import QueriesKeys
from vlmcompress.live.evidence import cls_row, wide
from vlmcompress.methods import create


def test_wide_row_is_attention_of_one_head():
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    joined_q, joined_k = (x.transpose(1, 2).reshape(2, 9, 32) for x in (q, k))
    want = (joined_q[:, :1] @ joined_k.transpose(1, 2) / 32**0.5).softmax(-1)
    got = cls_row(wide(QueriesKeys(q, k, 8**-0.5)))
    torch.testing.assert_close(got, want[:, :, 1:])


@pytest.mark.parametrize("family", ["llava", "vipllava"])
@torch.no_grad()
def test_cls_goes_through_the_connector(family):
    """The first row is what the connector makes of the tower's [CLS] state."""
    w = world(family)
    model, call = w.model, w.inputs(oracle.ONE)
    base, facts = model.base_model, family_of(model)
    states = facts.tower_module(base)(call["pixel_values"], output_hidden_states=True).hidden_states
    depth = len(facts.tower(base).layers(facts.tower_module(base)))
    cls = [states[layer + 1][:, :1] for layer in facts.read_layers(base, {}, depth)]
    want = base.multi_modal_projector(torch.cat(cls, -1))[:, 0]
    method = create("visionzip", contextual=2, faithful=True)
    with patch(model, method, keep=6) as handle:
        got = handle.encode(**call)["image"].pooler_output
        logits = model(**call).logits
        assert handle.last.tokens_after == (6,)
    torch.testing.assert_close(got[0][:1], want, rtol=1e-5, atol=1e-5)
    assert logits.isfinite().all()


def test_cls_that_no_connector_takes_is_refused():
    model = tiny.build("llava_next")
    if not family_of(model).tower(model.base_model).has_cls:
        pytest.skip("its tower has no [CLS]")
    with pytest.raises(EvidenceError, match="state of \\[CLS\\]"):
        patch(model, create("visionzip", faithful=True), keep=0.5)


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge_plus", "holov", "tome"])
def test_released_orders_have_no_original_positions(name):
    model = tiny.build("llava")
    with pytest.raises(ConfigError, match="positions='contiguous'"):
        patch(model, create(name, faithful=True), keep=0.5, positions="original")
    with patch(model, create(name, faithful=True), keep=0.5) as handle:
        assert handle.report.positions == "contiguous"
        with pytest.raises(ConfigError, match="positions='contiguous'"):
            handle.set(positions="original")


def test_released_orders_under_mrope():
    with pytest.raises(ConfigError, match="positions='contiguous'"):
        patch(tiny.build("qwen2_vl"), create("tome", faithful=True), keep=0.5)


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "holov", "tome", "pitome"])
@torch.no_grad()
def test_released_orders_equal_the_prompt_cut_by_hand(name):
    w = world("llava")
    call = w.inputs(equalities.TWO_IMAGES)
    with patch(w.model, create(name, faithful=True), keep=0.25, restore_length=False) as handle:
        got = w.model(**call).logits
        short = list(handle.encode(**call)["image"].pooler_output)
        cut = oracle.cut(w.model, call, handle.last.kept, short)
    torch.testing.assert_close(got, w.model(**cut).logits, rtol=0, atol=equalities.EXACT)


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("equality", ["cut_by_hand", "batch_is_singles", "cache_bytes"])
def test_counts_that_images_decide(name, equality):
    checks.check(equality, world("llava"), name)
    assert "auto" in equalities.budgets(name)


@pytest.mark.parametrize(
    "name", [n for n in matrix.names("connector") if matrix.runs_on(n, "llava")]
)
@torch.no_grad()
def test_nan_is_refused(name):
    """Methods that look at nothing but places go on, as the unpatched model does."""
    w = world("llava")
    call = w.inputs(oracle.ONE)
    call["pixel_values"] = torch.full_like(call["pixel_values"], torch.nan)
    configured = matrix.configured(name)
    blind = configured.reads == "none" and not configured.needs().attention
    with w.patched(name, 0.5, "contiguous"):
        if blind:
            assert w.model(**call).logits.isnan().any()
            return
        with pytest.raises(UnsupportedInputError, match=r"hold NaN.*dtype"):
            w.model(**call)
