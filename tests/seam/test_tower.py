"""Methods inside the tower: what leaves it, what follows it, and what cannot be reduced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.methods_list import TOWER_METHODS
from tests.seam import equalities, matrix, oracle, plain_tower
from tests.seam.equalities import world
from vlmcompress import (
    ConfigError,
    EvidenceError,
    UnsupportedInputError,
    UnsupportedModelError,
    patch,
)
from vlmcompress.families import family_of
from vlmcompress.methods import create, get
from vlmcompress.methods.pipeline import build

FAMILIES = ("llava", "llava_siglip", "paligemma")
#: How methods are named here that leave all patches in the tower's output unless told otherwise.
SPECS = {"token_clustering": "token_clustering(reconstruct=False)"}
PAIRS = [
    (family, SPECS.get(name, name))
    for family in FAMILIES
    for name, _ in TOWER_METHODS
    if family == "llava" or not get(name).needs_cls
]
pairs = pytest.mark.parametrize(("family", "name"), PAIRS)


def created(spec: str) -> Any:
    """The method of a spec, with the options it has there."""
    return build(spec, 0.5).templates[0]


def connector_input(model: Any, call: dict[str, Tensor], spec: Any, **more: Any) -> Any:
    """What the connector reads under a patch, and the record."""
    connector = family_of(model).connector(model.base_model)
    with patch(model, spec, **more) as handle:
        seen: list[Tensor] = []
        hook = connector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(**call)
        hook.remove()
        return seen[0], handle.last


def blocks(model: Any) -> Any:
    """The tower's blocks."""
    family = family_of(model)
    return family.tower(model.base_model).layers(family.tower_module(model.base_model))


RULES = {
    "tome_tower": lambda cls, depth: plain_tower.tome(cls),
    "evit": lambda cls, depth: plain_tower.evit,
    "mctf": lambda cls, depth: plain_tower.mctf(cls),
    "pitome_tower": lambda cls, depth: plain_tower.pitome(0.9, depth, cls),
}


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize(("family", "name"), [pair for pair in PAIRS if pair[1] in RULES])
@torch.no_grad()
def test_the_tower_equals_one_written_out(family, name, kernel):
    w = world(family, kernel)
    call, cls = w.inputs(oracle.MIXED), int(family == "llava")
    got, record = connector_input(w.model, call, name, keep=0.4)
    method, rule = create(name), RULES[name](cls, len(blocks(w.model)))
    want = plain_tower.run(
        *(w.model, call["pixel_values"], rule, record.tower_patches),
        weighed=method.weighs_keys,
        place=method.place,
    )
    assert record.tokens_after == (10, 10, 10)
    for image, rows in enumerate(want):
        torch.testing.assert_close(got[image], rows.x, rtol=1e-4, atol=1e-5)
        assert record.kept[image].tolist() == rows.source
        members = [(record.assignments[image] == i).nonzero()[:, 0].tolist() for i in range(10)]
        assert members == rows.members


@pairs
@torch.no_grad()
def test_later_blocks_see_fewer_rows(family, name):
    model = tiny.build(family)
    call = tiny.inputs(model, oracle.ONE)
    seen: dict[tuple[int, str], int] = {}
    for i, block in enumerate(blocks(model)):
        for part in ("self_attn", "mlp"):
            module = block.get_submodule(part)
            # The first norm runs on what the block is given; parts that are passed over see nothing
            # of their own, so that their last linear layer is what counts.
            last = module.out_proj if part == "self_attn" else module.fc2
            last.register_forward_hook(
                lambda m, args, out, at=(i, part): seen.update({at: out.shape[1]})
            )
    _, record = connector_input(model, call, name, keep=0.4)
    cls, plan = int(family == "llava"), record.tower_patches
    place = created(name).place
    before = (25, *plan[:-1])
    for i in range(len(plan)):
        assert seen[i, "self_attn"] == cls + (plan if place == "before" else before)[i]
        assert seen[i, "mlp"] == cls + (before if place == "after" else plan)[i]
    assert (len(plan), "mlp") not in seen
    assert plan[-1] == created(name).tokens_kept(25, 0.4)
    assert "patches after each tower layer" in "\n".join(record.lines())


@pairs
def test_keeping_all_is_the_unpatched_model_bit_for_bit(family, name):
    w = world(family)
    with torch.no_grad():
        for keep in (1.0, 25, 10_000):
            with patch(w.model, name, keep=keep) as handle:
                assert torch.equal(w.model(**w.call).logits, w.logits)
                assert torch.equal(w.generate(w.call).sequences, w.ids)
                assert handle.last.tower_patches == ()
                assert handle.last.tokens_after == handle.last.tokens_before


@pairs
@torch.no_grad()
def test_a_batch_equals_its_samples(family, name):
    w = world(family)
    with patch(w.model, f"{name}:0.6 | uniform:0.5") as handle:
        together = w.generate(w.call)
        equalities._compare_with_singles(w, handle, together, handle.last.kept)


@pairs
@torch.no_grad()
def test_contiguous_is_the_hand_cut_prompt_and_original_keeps_places(family, name):
    w = world(family)
    call = w.inputs(equalities.TWO_IMAGES)
    with patch(w.model, name, keep=0.4, positions="contiguous", restore_length=False) as handle:
        got, record = w.model(**call).logits, handle.last
        short = list(handle.encode(**call)["image"].pooler_output)
    equalities.assert_near(got, equalities._cut_logits(w.model, call, record.kept, short), None)
    assert all((rows.diff() > 0).all() for rows in record.kept)
    with patch(w.model, name, keep=0.4, positions="original") as handle:
        logits = w.model(**call).logits
        assert logits.shape == w.model(**call).logits.shape
    assert not torch.equal(logits, got)


@pairs
def test_remove_leaves_nothing_behind(family, name):
    w = world(family)
    with torch.no_grad():
        logits, keys = w.logits, list(w.model.state_dict())
        handle = patch(w.model, "uniform", keep=0.5)
        handle.set(method=name, keep=0.5)
        w.model(**w.call)
        twin = copy.deepcopy(w.model)
        assert list(w.model.state_dict()) == keys
        with handle.disabled():
            assert torch.equal(w.model(**w.call).logits, logits)
        handle.set(method="uniform", keep=1.0)
        assert torch.equal(w.model(**w.call).logits, logits)
        handle.remove()
        assert equalities.traces(w.model) == []
        assert torch.equal(w.model(**w.call).logits, logits)
        # The copy is patched on its own.
        assert twin(**w.call).logits.shape == logits.shape
        assert equalities.traces(twin)


@torch.no_grad()
def test_tower_forward_of_a_caller_is_whole():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    want = model.model.vision_tower(call["pixel_values"]).last_hidden_state
    with patch(model, "tome_tower", keep=0.4):
        assert torch.equal(model.model.vision_tower(call["pixel_values"]).last_hidden_state, want)


# --- pipelines ------------------------------------------------------------------------------------


@torch.no_grad()
def test_keep_is_for_the_stage_after_the_tower():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    with patch(model, ["tome_tower:0.6", "fastervlm"], keep=0.4) as handle:
        model(**call)
        assert handle.last.tower_patches[-1] == 15
        assert handle.last.tokens_after == (6,)
        assert handle.config.to_spec() == "tome_tower:0.6 | fastervlm:0.4"
        handle.set(keep=5)
        model(**call)
        assert handle.last.tokens_after == (5,)
    with patch(model, "evit(rate=0.7) | fastervlm", keep=4) as handle:
        model(**call)
        assert handle.last.tower_patches == (25, 25, 19, 15, 12)


@torch.no_grad()
def test_a_budget_of_its_own_takes_over_no_keep():
    model = tiny.build("llava")
    with patch(model, "uniform", keep=4) as handle:
        handle.set(method="evit(rate=0.7)")
        model(**tiny.inputs(model, oracle.ONE))
        assert handle.config.to_spec() == "evit(rate=0.7)"
        assert handle.last.tokens_after == (12,)


@torch.no_grad()
def test_a_later_selection_reads_scores_of_the_shortened_tower():
    """Evidence costs no rows: it is read in blocks that are short already."""
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    rows: dict[int, int] = {}
    for i, block in enumerate(blocks(model)):
        block.self_attn.k_proj.register_forward_hook(
            lambda m, args, out, i=i: rows.update({i: out.shape[1]})
        )
    with patch(model, "evit(layers=(1,)):0.4 | vtc_cls", keep=3) as handle:
        model(**call)
        layers = handle.last.layers
        assert handle.last.tokens_after == (3,)
    assert layers == (2, 3, 4)
    assert [rows[i] for i in (0, 1, *layers)] == [26, 26, 11, 11, 11]


@pytest.mark.parametrize("name", [SPECS.get(n, n) for n, _ in TOWER_METHODS])
@pytest.mark.parametrize("layer", [0, 2, 4, 5])
@torch.no_grad()
def test_evidence_is_that_of_the_shortened_sequence(name, layer):
    """Attention of a layer, summed over the rows that have become one since."""
    model = tiny.build("llava", attn_implementation="eager")
    call = tiny.inputs(model, oracle.MIXED)
    maps: list[Tensor] = []
    attention = blocks(model)[layer].self_attn
    seen: list[Any] = []

    class Spy(get("fastervlm")):  # type: ignore[misc]
        """Keeps what it is shown."""

        def compress(self, tokens, keep):
            seen.append(tokens)
            return super().compress(tokens, keep)

    patched = patch(model, [f"{name}:0.6", Spy(layer=layer)], keep=0.5)
    hook = attention.register_forward_hook(lambda m, args, out: maps.append(out[1]))
    model(**call)
    hook.remove()
    plan = patched.last.tower_patches
    patched.remove()
    (tokens,) = seen
    (rows,) = tokens.evidence.cls_attention.values()
    assert tokens.n == plan[-1] == created(name).tokens_kept(25, 0.6)
    weights = next(m for m in maps if m is not None)[:, :, 0, 1:]
    before = (25, *plan, plan[-1])[layer]
    if created(name).place == "before":
        before = (*plan, plan[-1])[layer]
    assert weights.shape[-1] == before
    if layer > 4:  # nothing was reduced since: the rows are those of the kernel, reordered
        for got, want in zip(rows, weights, strict=True):
            torch.testing.assert_close(got.sort().values, want.sort().values)
    elif before == 25 and layer == 0:
        for got, want, assignment in zip(rows, weights, tokens.assignment, strict=True):
            for i in range(tokens.n):
                share = want[:, assignment == i].sum(1)
                torch.testing.assert_close(got[:, i], share)


@torch.no_grad()
def test_text_and_keys_and_features_follow():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.MIXED)
    for spec in ("tome", "visionzip(contextual=2)", "prumerge", "divprune", "pool"):
        with patch(model, f"tome_tower:16 | {spec}", keep=8) as handle:
            if spec == "pool":
                with pytest.raises(ConfigError, match="put pool first"):
                    model(**call)
                continue
            model(**call)
            assert handle.last.tokens_after == (8, 8, 8)
    with patch(model, "tome_tower:16 | cdpruner", keep=8, **equalities.asking(model)) as handle:
        model(**call)
        assert handle.last.tokens_after == (8, 8, 8)


@torch.no_grad()
def test_overlay_shows_patches_of_merged_tokens():
    from PIL import Image

    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    with patch(model, "tome_tower", keep=6) as handle:
        model(**call)
        assert (handle.last.assignments[0] >= 0).all()
        assert handle.overlay(Image.new("RGB", (20, 20))).size == (20, 20)


def test_gradients_reach_the_pixels():
    model = tiny.build("llava")
    for name, _ in TOWER_METHODS:
        call = tiny.inputs(model, oracle.ONE)
        call["pixel_values"] = call["pixel_values"].requires_grad_()
        with patch(model, name, keep=0.4):
            model(**call).logits.sum().backward()
        assert call["pixel_values"].grad.abs().sum() > 0


@pairs
@pytest.mark.parametrize("dtype", matrix.LOW)
@torch.no_grad()
def test_half_precision(family, name, dtype):
    w = world(family, "sdpa", dtype)
    with patch(w.model, name, keep=0.4) as handle:
        logits = w.model(**w.call).logits
        assert logits.dtype == w.dtype
        assert logits.isfinite().all()
        assert handle.last.tokens_after == (created(name).tokens_kept(25, 0.4),) * 3


# --- what cannot be -------------------------------------------------------------------------------

REFUSED = {
    "llava_pixtral": "cannot be reduced between its blocks",
    "qwen2_vl": "packs images",
    "qwen2_5_vl": "packs images",
    "glm4v": "packs images",
    "kimi_k25": "packs images",
    "ovis2": "cannot be reduced",
    "aya_vision": "counts its rows",
    "cohere2_vision": "counts its rows",
    "llava_next": "counts its rows",
    "llava_onevision": "counts its rows",
    "vipllava": "reads several layers",
}


@pytest.mark.parametrize("family", REFUSED)
def test_towers_that_cannot_be_reduced_are_refused(family):
    model = tiny.build(family)
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        patch(model, "tome_tower", keep=0.5)
    assert equalities.traces(model) == []


def test_every_family_is_reduced_or_refused():
    assert {*FAMILIES, *REFUSED} == set(tiny.FAMILIES)


def test_cls_methods_need_cls():
    with pytest.raises(EvidenceError, match="has none; use 'tome_tower'"):
        patch(tiny.build("paligemma"), "evit", keep=0.5)


def test_kernels_without_masks_are_refused_where_keys_are_weighed():
    w = world("llava", "fake_flash")
    for name in ("tome_tower", "pitome_tower", "mctf"):
        with pytest.raises(UnsupportedModelError, match=r"takes no such mask.*proportional=False"):
            patch(w.model, name, keep=0.5)
    plain = world("llava")
    for spec in ("evit", "tome_tower(proportional=False)"):
        with (
            torch.no_grad(),
            patch(w.model, spec, keep=0.4) as a,
            patch(plain.model, spec, keep=0.4) as b,
        ):
            torch.testing.assert_close(
                w.model(**w.call).logits, plain.model(**w.call).logits, rtol=1e-4, atol=1e-5
            )
            assert torch.equal(a.kept[0], b.kept[0])


@pytest.mark.parametrize(
    ("method", "keep", "match"),
    [
        ("tome_tower", None, "has no budget"),
        ("tome_tower(r=2)", 0.5, "says twice"),
        ("tome_tower", "auto", "inside it"),
        ("tome_tower | evit:0.5", 0.5, "one method at most"),
        ("fastervlm:0.5 | tome_tower:0.5", None, "before those between"),
        ("tome_tower | fastervlm:0.5", 0.5, "'tome_tower' has no budget"),
        ("tome_tower:0.9 | fastervlm:0.5 | uniform:0.5", 0.5, "give it in one place"),
        ("tome_tower(layers=(-1,))", 0.5, "output of layer 4"),
        ("tome_tower(layers=(3,))", 5, "come down to 13, not 5"),
        ("tome_tower(r=2, layers=(1,))", None, "leave one of"),
        ("pitome_tower(ratio=0.4)", None, "at most half"),
        ("pitome_tower(layers=(1,))", 3, "come down to 13"),
        ("evit(rate=0.0)", None, "rate is 0"),
    ],
)
def test_settings_that_make_no_sense(method, keep, match):
    model = tiny.build("llava")
    with pytest.raises(ConfigError, match=match):
        patch(model, method, keep=keep)


@torch.no_grad()
def test_nan_is_refused():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    call["pixel_values"][0, 0, 0, 0] = torch.nan
    with patch(model, "tome_tower", keep=0.4), pytest.raises(UnsupportedInputError, match="NaN"):
        model(**call)


@torch.no_grad()
def test_a_tower_that_does_not_run_is_noticed():
    model = tiny.build("llava")
    call = tiny.inputs(model, oracle.ONE)
    tower = model.model.vision_tower
    recorded = tower(call["pixel_values"], output_hidden_states=True)
    with patch(model, "tome_tower", keep=0.4):
        tower.forward = lambda *args, **kwargs: recorded
        with pytest.raises(UnsupportedModelError, match="did not run"):
            model(**call)


@torch.no_grad()
def test_cls_among_the_tokens_is_refused():
    model = tiny.build("llava")
    call = {**tiny.inputs(model, oracle.ONE), "vision_feature_select_strategy": "full"}
    with (
        patch(model, "tome_tower", keep=0.4),
        pytest.raises(UnsupportedInputError, match="11 rows per image and 10 patches"),
    ):
        model(**call)


def test_checkpointed_towers_are_refused_in_training():
    model = tiny.build("llava").train()
    for block in blocks(model):
        block.gradient_checkpointing = True
    call = tiny.inputs(model, oracle.ONE)
    with (
        patch(model, "tome_tower", keep=0.4),
        pytest.raises(UnsupportedInputError, match="checkpointing"),
    ):
        model(**call)
