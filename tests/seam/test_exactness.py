"""The equalities: keep all = unpatched, drop = mask, batch = singles, remove leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.methods_list import CONNECTOR_METHODS
from tests.seam import matrix, oracle
from vlmcompress import patch
from vlmcompress.methods import create

OPTIONS = dict(CONNECTOR_METHODS)
PAIRS = matrix.slices()


def method(name):
    # Layer options of the shared list are made for twelve layers; the tiny towers have six.
    options = {k: v for k, v in OPTIONS[name].items() if k not in ("layers", "layer")}
    return create(name, **options)


@pytest.fixture(scope="module")
def models():
    cache = {}

    def get(family, kernel="sdpa"):
        if (family, kernel) not in cache:
            cache[family, kernel] = tiny.build(family, attn_implementation=kernel)
        return cache[family, kernel]

    return get


@pytest.mark.parametrize("kernel", matrix.KERNELS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_keeping_all_is_the_unpatched_model_bit_for_bit(models, family, kernel):
    model = models(family, kernel)
    call = tiny.inputs(model, oracle.MIXED)
    logits, ids = model(**call).logits, model.generate(**call, **oracle.greedy(model))
    for keep in (1.0, 10_000):
        with patch(model, keep=keep) as handle:
            assert torch.equal(model(**call).logits, logits)
            assert torch.equal(model.generate(**call, **oracle.greedy(model)), ids)
            assert handle.last.tokens_after == handle.last.tokens_before
    assert torch.equal(model(**call).logits, logits)
    assert torch.equal(model.generate(**call, **oracle.greedy(model)), ids)


def _traces(model):
    found = []
    for name, module in model.named_modules():
        found += [
            (name, key)
            for key in module.__dict__
            if "vlmcompress" in key or key in ("forward", "generate")
        ]
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        found += [(name, h) for group in hooks for h in group.values() if "vlmcompress" in repr(h)]
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_remove_leaves_nothing_behind(models, family):
    model = models(family)
    call = tiny.inputs(model, oracle.MIXED)
    keys = list(model.state_dict())
    handle = patch(model, keep=0.25)
    assert _traces(model)
    assert list(model.state_dict()) == keys
    model(**call)
    handle.remove()
    handle.remove()
    assert _traces(model) == []


@torch.no_grad()
def check_dropping_is_masking(model, name, kept=0.25):
    call = tiny.inputs(model, oracle.MIXED)
    full = model(**call).logits
    with patch(model, method(name), keep=kept, positions="original") as handle:
        got = model(**call).logits
        record = handle.last
    want = oracle.masked_logits(model, call, record.kept, record.tokens_before)
    seen = oracle.drop_mask(model, call, record.kept, record.tokens_before).bool()
    assert got.shape == full.shape
    assert (got - want)[seen].abs().max() < 1e-5
    assert (got - full)[seen].abs().max() > 0.05, "the comparison has no power"
    assert got[~seen & call["attention_mask"].bool()].abs().max() == 0


@torch.no_grad()
def check_contiguous_is_the_hand_cut_prompt(model, name, kept=0.25):
    call = tiny.inputs(model, [tiny.Prompt(images=2, text=7)])
    arguments = {"keep": kept, "positions": "contiguous", "restore_length": False}
    with patch(model, method(name), **arguments) as handle:
        got = model(**call).logits
        record = handle.last
        short = list(handle.encode(**call)["image"].pooler_output)
    if not matrix.exempt("drop = mask", method=name):
        full = oracle.features(model, call)
        by_hand = [f[rows] for f, rows in zip(full, record.kept, strict=True)]
        # Selecting before the connector equals selecting after it, up to the size of a matrix
        # product.
        assert max((a - b).abs().max() for a, b in zip(short, by_hand, strict=True)) < 1e-5
    cut = oracle.cut(model, call, record.kept, short)
    want = model(**cut, **oracle.text_positions_like(model, cut)).logits
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-5


@torch.no_grad()
def check_a_padded_batch_equals_its_samples(model, name, positions, kept=0.25):
    call = tiny.inputs(model, oracle.MIXED)
    new = 4
    with patch(model, method(name), keep=kept, positions=positions):
        together = model.generate(**call, **oracle.greedy(model, new))
        for b in range(len(oracle.MIXED)):
            single = oracle.row(call, b, model.config.image_token_id, tiny.tokens_per_image(model))
            alone = model.generate(**single, **oracle.greedy(model, new))
            assert torch.equal(alone[0, -new:], together[b, -new:]), f"row {b}"
    assert torch.equal(together[:, :-new], call["input_ids"])


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_dropping_is_masking(models, family, name):
    if reason := matrix.exempt("drop = mask", method=name, family=family):
        pytest.skip(reason)
    check_dropping_is_masking(models(family), name)


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_contiguous_is_the_hand_cut_prompt(models, family, name):
    check_contiguous_is_the_hand_cut_prompt(models(family), name)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_padded_batch_equals_its_samples(models, family, name, positions):
    check_a_padded_batch_equals_its_samples(models(family), name, positions)


@pytest.mark.matrix
@pytest.mark.parametrize("kept", [1, 0.5, "auto"])
@pytest.mark.parametrize("kernel", matrix.KERNELS)
@pytest.mark.parametrize(("family", "name"), matrix.everything())
def test_the_whole_matrix(models, family, name, kernel, kept):
    if kept == "auto" and not create(name).scored:
        pytest.skip("auto needs scores")
    model = models(family, kernel)
    if not matrix.exempt("drop = mask", method=name, family=family):
        check_dropping_is_masking(model, name, kept)
    check_contiguous_is_the_hand_cut_prompt(model, name, kept)
    for positions in ("original", "contiguous"):
        check_a_padded_batch_equals_its_samples(model, name, positions, kept)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_cached_generation_equals_uncached(models, family, positions):
    model = models(family)
    call = tiny.inputs(model, oracle.MIXED)
    with patch(model, keep=0.25, positions=positions):
        cached = model.generate(**call, **oracle.greedy(model))
        uncached = model.generate(**call, **oracle.greedy(model), use_cache=False)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_cached_generation_equals_the_masked_model(models, family):
    model = models(family)
    call = tiny.inputs(model, oracle.ONE)
    with patch(model, keep=0.25, positions="original") as handle:
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


def test_the_documentation_prints_the_exemptions():
    page = (Path(__file__).parents[2] / "docs" / "exactness.md").read_text(encoding="utf-8")
    assert matrix.exemptions_table() in page
    assert all(reason.partition(": ")[2].strip() for _, _, reason in matrix.EXEMPT)
