"""The equalities on slices of the matrix, and that they notice mistakes."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.seam import checks, equalities, matrix, oracle
from tests.seam.equalities import world

PAIRS = matrix.slices()
#: Of each image; towers cannot always come down that far.
QUARTER = {"connector": [0.25], "tower": [0.4], "decoder": [0.25], "prompt": [4]}
#: Equalities that run under every kernel and dtype, and those of methods inside the model.
CROSSED = [e for e in matrix.EQUALITIES if e not in matrix.ONCE_PER_FAMILY]
INSIDE = [(matrix.chosen_families(m)[0], m) for m in matrix.names("tower", "decoder")]
pairs = pytest.mark.parametrize(("family", "name"), PAIRS)


def hold(equality, family, name):
    """An equality with one budget, unless it does not exist there."""
    place = {"method": name, "family": family, "kernel": "sdpa", "dtype": "float32"}
    if reason := matrix.exempt(equality, **place):
        pytest.skip(reason)
    told = matrix.configured(name)
    keeps = [None] if told.own_budget else QUARTER[told.stage]
    checks.check(equality, world(family), name, keeps)


@pytest.mark.parametrize("kernel", matrix.SLICE_KERNELS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_keeping_all_is_the_unpatched_model_bit_for_bit(family, kernel):
    w = world(family, kernel)
    equalities.keep_all(w, "uniform")
    assert torch.equal(w.model(**w.call).logits, w.logits)
    assert torch.equal(w.generate(w.call).sequences, w.ids)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_remove_leaves_nothing_behind(family):
    equalities.remove_restores(world(family), "uniform")


@pairs
def test_dropping_is_masking(family, name):
    hold("drop_is_mask", family, name)


@pairs
def test_contiguous_is_the_hand_cut_prompt(family, name):
    hold("cut_by_hand", family, name)


@pairs
def test_a_padded_batch_equals_its_samples(family, name):
    hold("batch_is_singles", family, name)


@pytest.mark.parametrize(("family", "name"), INSIDE)
def test_caches_of_methods_inside_a_model(family, name):
    hold("cache_bytes", family, name)


@pytest.mark.parametrize("equality", ["keep_all", "remove_restores", *matrix.ONCE_PER_FAMILY])
@pytest.mark.parametrize(("family", "name"), INSIDE)
def test_methods_inside_a_model(family, name, equality):
    place = {"method": name, "family": family, "kernel": "sdpa", "dtype": "float32"}
    if reason := matrix.exempt(equality, **place):
        pytest.skip(reason)
    checks.check(equality, world(family), name)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_generation_equals_uncached(family):
    equalities.cached_is_uncached(world(family), "uniform", [0.25])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_cached_generation_equals_the_masked_model(family):
    w = world(family)
    model, call = w.model, w.inputs(oracle.ONE)
    with w.patched("divprune", 0.25, "original") as handle:
        got = model.generate(**call, **oracle.greedy(model, 3))
        record = handle.last
    banned = tiny.special_ids(model)
    ids, tokens = call["input_ids"], []
    for _ in range(3):
        # A full, uncached and masked forward per token.
        extra = torch.tensor([tokens], dtype=torch.long).view(1, -1)
        grown = {**call, "input_ids": torch.cat([ids, extra], 1)}
        grown["attention_mask"] = torch.ones_like(grown["input_ids"])
        for name, fill in (("token_type_ids", 1), ("mm_token_type_ids", 0)):
            if name in call:
                grown[name] = torch.cat([call[name], torch.full_like(extra, fill)], 1)
        logits = oracle.masked_logits(model, grown, record.kept, record.tokens_before)[0, -1]
        logits[banned] = -torch.inf
        tokens.append(int(logits.argmax()))
    assert got[0, ids.shape[1] :].tolist() == tokens


# --- half precision and other kernels -----------------------------------------------------------


@pytest.mark.parametrize("dtype", matrix.LOW)
@pytest.mark.parametrize("equality", CROSSED)
def test_half_precision(equality, dtype):
    checks.check(equality, world("llava", "sdpa", dtype), "received_attention")


@pytest.mark.parametrize("family", matrix.THREE_FAMILIES)
@pytest.mark.parametrize("equality", CROSSED)
def test_the_flash_path(equality, family):
    place = {"method": "divprune", "family": family, "kernel": "fake_flash", "dtype": "float32"}
    if reason := matrix.exempt(equality, **place):
        pytest.skip(reason)
    checks.check(equality, world(family, "fake_flash"), "divprune")


@torch.no_grad()
def test_paligemma_under_flash_differs_unpatched():
    w = world("paligemma", "fake_flash")
    cached, uncached = w.generate(w.call), w.generate(w.call, use_cache=False)
    assert not torch.equal(cached.sequences, uncached.sequences)


@pytest.mark.parametrize("dtype", matrix.DTYPES)
@pytest.mark.parametrize("family", matrix.THREE_FAMILIES)
@torch.no_grad()
def test_a_wrong_token_is_noticed(family, dtype):
    """One kept token exchanged for its neighbour, in one image of the batch."""
    w = world(family, "sdpa", dtype)
    with w.patched("uniform", 0.25, "original") as handle:
        got = w.model(**w.call).logits
        record = handle.last
    equalities.compare_with_mask(w, got, record.kept, record.tokens_before)
    wrong = record.kept[0].clone()
    wrong[1] += 1
    masked = (w.call, (wrong, *record.kept[1:]), record.tokens_before)
    want = oracle.masked_logits(w.model, *masked)
    exact = oracle.masked_logits(w.twin, equalities.float32(w.call), *masked[1:]) if w.low else None
    # The text alone; the exchanged token itself would be too easy to tell.
    text = w.valid & (w.call["input_ids"] != w.model.config.image_token_id)
    with pytest.raises(AssertionError, match="row 0"):
        equalities.assert_near(got, want, exact, text)


@pytest.mark.parametrize("dtype", matrix.DTYPES)
@pytest.mark.parametrize("family", matrix.THREE_FAMILIES)
@torch.no_grad()
def test_wrong_positions_are_noticed(family, dtype):
    w = world(family, "sdpa", dtype)
    with w.patched("uniform", 0.25, "contiguous") as handle:
        got = w.model(**w.call).logits
        record = handle.last
    with pytest.raises(AssertionError, match="row 0"):
        equalities.compare_with_mask(w, got, record.kept, record.tokens_before, powerful=False)
