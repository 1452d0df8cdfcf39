"""Mistakes inside the language model that its equalities are there to notice."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.seam import equalities, layer_equalities, matrix
from tests.seam.reductions import Decision
from tests.seam.worlds import world

METHOD, KEEP = "random_layer", [0.3]
families = pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma"])
dtypes = pytest.mark.parametrize("dtype", matrix.DTYPES)


def misheard(monkeypatch, change):
    """The reference is given other decisions than the model has made."""
    heard = layer_equalities._heard

    def changed(*args):
        logits, decisions = heard(*args)
        return logits, [change(decision) for decision in decisions]

    monkeypatch.setattr(layer_equalities, "_heard", changed)


def another_token(decision: Decision) -> Decision:
    """In each sample the first visual row that goes stays, and the first that stays goes."""
    keep = decision.reduction.keep.clone()
    for b, visual in enumerate(decision.state.visual):
        for there in (decision.stays[b] & visual, ~decision.stays[b] & visual):
            if there.any():
                first = int(there.nonzero()[0])
                keep[b, first] = ~keep[b, first]
    return dataclasses.replace(
        decision, reduction=dataclasses.replace(decision.reduction, keep=keep)
    )


def a_layer_later(decision: Decision) -> Decision:
    """The same, one layer too late."""
    site = dataclasses.replace(decision.site, where="between")
    return dataclasses.replace(decision, site=site)


@dtypes
@families
@pytest.mark.parametrize("equality", ["drop_is_mask", "cut_by_hand"])
def test_another_token_is_noticed(monkeypatch, equality, family, dtype):
    w = world(family, "sdpa", dtype)
    getattr(layer_equalities, equality)(w, METHOD, KEEP)
    misheard(monkeypatch, another_token)
    with pytest.raises((AssertionError, IndexError)):
        getattr(layer_equalities, equality)(w, METHOD, KEEP)


@dtypes
@families
def test_a_layer_too_late_is_noticed(monkeypatch, family, dtype):
    misheard(monkeypatch, a_layer_later)
    with pytest.raises(AssertionError, match="row 0"):
        layer_equalities.drop_is_mask(world(family, "sdpa", dtype), METHOD, KEEP)


@dtypes
@torch.no_grad()
def test_wrong_positions_are_noticed(monkeypatch, dtype):
    w = world("llava", "sdpa", dtype)
    call = w.inputs(equalities.TWO_IMAGES)
    got, decisions = layer_equalities._heard(w, METHOD, KEEP[0], "contiguous", call)
    want, columns = layer_equalities._cut_logits(w, w.reference, call, decisions, "original")
    exact = None
    if w.low:
        wide = equalities.float32(call)
        exact, _ = layer_equalities._cut_logits(w, w.twin, wide, decisions, "original")
    with pytest.raises(AssertionError, match="row 0"):
        equalities.assert_near(got[:, columns], want, exact)


def test_a_cache_of_full_layers_is_noticed(monkeypatch):
    misheard_lengths = layer_equalities._lengths
    monkeypatch.setattr(
        layer_equalities,
        "_lengths",
        lambda decisions, depth, length: misheard_lengths(decisions[1:], depth, length),
    )
    with pytest.raises(AssertionError):
        layer_equalities.cache_bytes(world("llava"), METHOD, KEEP)
