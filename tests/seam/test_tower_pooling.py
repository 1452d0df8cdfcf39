"""Token clustering, Vote&Mix and HVT in real towers, and patches that come back before the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.seam import equalities, matrix, oracle, plain_pooling, plain_tower
from tests.seam.equalities import world
from tests.seam.test_tower import FAMILIES, blocks, connector_input
from vlmcompress import ConfigError, patch
from vlmcompress.methods import create, get

RULES = {
    "token_clustering": plain_pooling.token_clustering,
    "token_clustering(reconstruct=False)": plain_pooling.token_clustering,
    "vomix": plain_pooling.vomix,
    "hvt": plain_pooling.hvt,
}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("spec", RULES)
@families
@torch.no_grad()
def test_the_tower_equals_one_written_out(family, spec, kernel):
    w = world(family, kernel)
    call, cls = w.inputs(oracle.MIXED), int(family == "llava")
    got, record = connector_input(w.model, call, spec, keep=0.4)
    want = plain_tower.run(
        *(w.model, call["pixel_values"], RULES[spec](cls), record.tower_patches),
        weighed=False,
        place=create(spec.partition("(")[0]).place,
    )
    for image, rows in enumerate(want):
        torch.testing.assert_close(got[image][-len(rows.x) :], rows.x, rtol=1e-4, atol=1e-5)
        assert record.kept[image].tolist() == rows.source
        if len(rows.x) < 25:
            places = range(len(rows.x))
            members = [(record.assignments[image] == i).nonzero()[:, 0].tolist() for i in places]
            assert members == rows.members


# --- patches that come back -----------------------------------------------------------------------


@families
@torch.no_grad()
def test_all_patches_leave_and_blocks_between_see_clusters(family):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.ONE)
    seen: dict[int, int] = {}
    for i, block in enumerate(blocks(model)):
        block.self_attn.out_proj.register_forward_hook(
            lambda m, args, out, i=i: seen.update({i: out.shape[1]})
        )
    got, record = connector_input(model, call, "token_clustering", keep=0.4)
    plan, cls = record.tower_patches, int(family == "llava")
    last = len(plan) - 1
    assert plan == (*[25] * 2, *[9] * (last - 2), 25)
    assert [seen[i] - cls for i in range(last + 1)] == [25, *plan[:-1]]
    assert record.tokens_after == record.tokens_before == (25,)
    assert record.token_index is None
    assert "patches after each tower layer" in "\n".join(record.lines())
    assert got.shape[1] in (25, 25 + cls)
    whole, _ = connector_input(model, call, "uniform", keep=1.0)
    assert not torch.equal(got, whole)


@families
@torch.no_grad()
def test_generate_sees_a_prompt_of_full_length(family):
    w = world(family)
    with patch(w.model, "token_clustering", keep=0.4) as handle:
        got = w.generate(w.call)
        logits = w.model(**w.call).logits
        assert handle.last.short_length == handle.last.prompt_length
    assert logits.shape == w.logits.shape
    assert not torch.equal(logits, w.logits)
    assert got.sequences.shape == w.ids.shape


@families
@torch.no_grad()
def test_the_language_model_runs_on_the_reconstruction_as_on_any_features(family):
    w = world(family)
    call = w.inputs(equalities.TWO_IMAGES)
    with patch(w.model, "token_clustering", keep=0.4) as handle:
        got, kept = w.model(**call).logits, handle.last.kept
        features = list(handle.encode(**call)["image"].pooler_output)
    by_hand = equalities._cut_logits(w.model, call, kept, features)
    equalities.assert_near(got, by_hand, None)


@families
@torch.no_grad()
def test_keeping_all_is_the_unpatched_model_bit_for_bit(family):
    w = world(family)
    for keep in (1.0, 25, 10_000):
        with patch(w.model, "token_clustering", keep=keep) as handle:
            assert torch.equal(w.model(**w.call).logits, w.logits)
            assert torch.equal(w.generate(w.call).sequences, w.ids)
            assert handle.last.tower_patches == ()


@families
@torch.no_grad()
def test_a_batch_equals_its_samples(family):
    w = world(family)
    for spec in ("token_clustering:0.4", "token_clustering:0.4 | uniform:0.5"):
        with patch(w.model, spec) as handle:
            together = w.generate(w.call)
            equalities._compare_with_singles(w, handle, together, handle.last.kept)


@pytest.mark.parametrize("layer", [0, 2, 3, 4, 5])
@torch.no_grad()
def test_evidence_of_clusters_is_shared_among_their_patches(layer):
    model = tiny.build("llava", attn_implementation="eager")
    call = tiny.inputs(model, oracle.MIXED)
    maps: list[Tensor] = []
    seen: list[Any] = []

    class Spy(get("fastervlm")):  # type: ignore[misc]
        """Keeps what it is shown."""

        def compress(self, tokens, keep):
            seen.append(tokens)
            return super().compress(tokens, keep)

    patched = patch(model, ["token_clustering:0.4", Spy(layer=layer)], keep=0.5)
    hook = blocks(model)[layer].self_attn.register_forward_hook(
        lambda m, args, out: maps.append(out[1])
    )
    model(**call)
    hook.remove()
    patched.remove()
    _, short = connector_input(model, call, "token_clustering(reconstruct=False)", keep=0.4)
    (tokens,) = seen
    (rows,) = tokens.evidence.cls_attention.values()
    weights = next(m for m in maps if m is not None)[:, :, 0, 1:]
    assert rows.shape[-1] == tokens.n == 25
    assert weights.shape[-1] == (9 if layer in (3, 4) else 25)
    torch.testing.assert_close(rows.sum(-1), weights.sum(-1))
    for got, want, assignment in zip(rows, weights, short.assignments, strict=True):
        if layer in (3, 4):
            want = want[:, assignment] / torch.bincount(assignment)[assignment]
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_stages_after_it_act_as_after_a_whole_tower():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.MIXED)
    for spec in ("tome", "visionzip(contextual=2)", "prumerge", "divprune", "pool", "vtc_cls"):
        with patch(model, f"token_clustering:0.4 | {spec}", keep=9) as handle:
            model(**call)
            record = handle.last
            assert record.tokens_after == (9, 9, 9)
            assert 9 in record.tower_patches
            assert record.tower_patches[-1] == 25
            assert all(len(assigned) == 25 for assigned in record.assignments)
    with patch(model, "token_clustering:0.4 | uniform", keep=1.0) as handle:
        model(**call)
        assert handle.last.tokens_after == (25,) * 3


@torch.no_grad()
def test_overlay_after_reconstruction_shows_all():
    from PIL import Image

    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    with patch(model, "token_clustering", keep=6) as handle:
        model(**call)
        assert torch.equal(handle.last.kept[0], torch.arange(25))
        assert handle.overlay(Image.new("RGB", (20, 20))).size == (20, 20)


@torch.no_grad()
def test_remove_and_sweeps():
    w = world("llava")
    handle = patch(w.model, "token_clustering", keep=0.4)
    first = w.model(**w.call).logits
    handle.set(keep=0.2)
    assert not torch.equal(w.model(**w.call).logits, first)
    assert 4 in handle.last.tower_patches
    handle.set(method="vomix")
    w.model(**w.call)
    assert handle.last.tower_patches == (18, 13, 10, 7, 5)
    handle.remove()
    assert torch.equal(w.model(**w.call).logits, w.logits)
    assert equalities.traces(w.model) == []


@torch.no_grad()
def test_published_schedules():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    plans = {"hvt(stages=2)": (12, 12, 12, 5, 5), "vomix(r=0.2)": (20, 16, 13, 11, 9)}
    for spec, plan in plans.items():
        with patch(model, spec) as handle:
            model(**call)
            assert handle.last.tower_patches == plan
            assert handle.last.tokens_after == (plan[-1],)


def test_gradients_reach_every_pixel():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    call["pixel_values"] = call["pixel_values"].requires_grad_()
    with patch(model, "token_clustering", keep=0.2):
        model(**call).logits.sum().backward()
    grad = call["pixel_values"].grad
    patches = grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5))
    assert patches.shape[1:] == (5, 5)
    assert (patches > 0).all()


@families
@pytest.mark.parametrize("dtype", matrix.LOW)
@torch.no_grad()
def test_half_precision(family, dtype):
    w = world(family, "sdpa", dtype)
    with patch(w.model, "token_clustering", keep=0.4) as handle:
        logits = w.model(**w.call).logits
        assert logits.dtype == w.dtype
        assert logits.isfinite().all()
        assert handle.last.tokens_after == (25, 25, 25)


def test_kernels_without_masks_will_do():
    plain, flash = world("llava"), world("llava", "fake_flash")
    for spec in RULES:
        with (
            torch.no_grad(),
            patch(flash.model, spec, keep=0.4) as a,
            patch(plain.model, spec, keep=0.4) as b,
        ):
            torch.testing.assert_close(
                flash.model(**flash.call).logits,
                plain.model(**plain.call).logits,
                rtol=1e-4,
                atol=1e-5,
            )
            assert torch.equal(a.kept[0], b.kept[0])


@pytest.mark.parametrize(
    ("spec", "keep", "match"),
    [
        ("token_clustering", None, "has no budget"),
        ("token_clustering(layer=4)", 0.4, "no block runs on the clusters"),
        ("token_clustering(until=5)", 0.4, "output of layer 4"),
        ("hvt(stages=2)", 0.5, "says twice"),
        ("hvt", None, "has no budget"),
        ("vomix(r=0.1)", 0.5, "says twice"),
        ("vomix(layers=(5,))", 0.5, "output of layer 4"),
        ("hvt | vomix:0.5", 0.5, "one method at most"),
    ],
)
def test_settings_that_make_no_sense(spec, keep, match):
    with pytest.raises(ConfigError, match=match):
        patch(tiny.build("llava"), spec, keep=keep)
