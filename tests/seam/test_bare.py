"""Vision transformers without a language model: what is returned, what is saved, what is left."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.seam import bare_models, equalities, plain_bare, plain_learned, plain_tower
from tests.seam.bare_models import BUILD, DEPTH, HEADS, N, embed
from tests.seam.plain_learned import shake
from vlmcompress import CompressionConfig, StageConfig, handle_of, patch
from vlmcompress.methods import create
from vlmcompress.methods.inside import names_inside

NAMES = tuple(BUILD)
models = pytest.mark.parametrize("name", NAMES)
RULES = {
    "tome_tower": lambda cls: plain_tower.tome(cls),
    "evit": lambda cls: plain_tower.evit,
    "mctf": lambda cls: plain_tower.mctf(cls),
    "pitome_tower": lambda cls: plain_tower.pitome(0.9, DEPTH, cls),
}


def has_cls(name: str) -> bool:
    """Whether a model has a [CLS] row."""
    return bool(plain_bare.prefix(bare_models.build(name))[0])


def assert_written_out(model: Any, method: str) -> None:
    """A patched model gives what one written out gives, and says which patches went where."""
    images = bare_models.pixels()
    cls, _ = plain_bare.prefix(model)
    with patch(model, method, keep=0.4) as handle:
        if handle.parts is not None:
            shake(handle.parts)
            rule = plain_learned.sit(cls, dict(handle.parts.state_dict()))
        else:
            rule = RULES[method](cls)
        got, last = embed(model, images), handle.last
    made, plan = create(method), last.tower_patches
    want = plain_bare.run(
        *(model, images, rule, plan),
        heads=HEADS,
        weighed=made.weighs_keys,
        place=made.place,
    )
    assert last.tokens_after == (10, 10, 10)
    for i, (embedding, rows) in enumerate(want):
        torch.testing.assert_close(got[i], embedding, rtol=1e-4, atol=2e-5)
        assert last.kept[i].tolist() == rows.source
        members = [(last.assignments[i] == j).nonzero()[:, 0].tolist() for j in range(10)]
        assert members == rows.members


@models
@pytest.mark.parametrize("method", [*RULES, "sit"])
@torch.no_grad()
def test_it_equals_one_written_out(name, method):
    if method == "evit" and not has_cls(name):
        pytest.skip("has no [CLS] token")
    assert_written_out(bare_models.build(name), method)


@pytest.mark.parametrize("name", ["clip", "siglip_vision", "registers_classifier", "vit"])
@torch.no_grad()
def test_the_eager_kernel(name):
    assert_written_out(bare_models.build(name, "eager"), "tome_tower")


@models
@torch.no_grad()
def test_keeping_all_and_removing_are_the_model_bit_for_bit(name):
    model, images = bare_models.build(name), bare_models.pixels()
    want, keys = embed(model, images), list(model.state_dict())
    for keep in (1.0, N, 10_000):
        with patch(model, "tome", keep=keep) as handle:
            assert torch.equal(embed(model, images), want)
            assert handle.last.tower_patches == ()
            assert handle.last.tokens_after == handle.last.tokens_before == (N,) * 3
            assert handle.last.tower_flops == handle.last.tower_flops_before
    handle = patch(model, "tome", keep=0.4)
    assert list(model.state_dict()) == keys
    assert not torch.equal(embed(model, images), want)
    with handle.disabled():
        assert torch.equal(embed(model, images), want)
    handle.remove()
    handle.remove()
    assert equalities.traces(model) == []
    assert torch.equal(embed(model, images), want)


@models
@torch.no_grad()
def test_blocks_see_fewer_rows(name):
    model = bare_models.build(name)
    seen: dict[int, set[int]] = {}
    for i, block in enumerate(plain_bare.blocks(model)):
        last = [m for m in block.mlp.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.register_forward_hook(
            lambda m, args, out, i=i: seen.setdefault(i, set()).add(out[..., 0].numel() // 3)
        )
    before = sum(plain_bare.prefix(model))
    with patch(model, "tome", keep=0.4) as handle:
        embed(model, bare_models.pixels())
        plan = handle.last.tower_patches
    assert plan[-1] == 10
    assert [seen[i] for i in range(DEPTH)] == [{left + before} for left in plan]


@pytest.mark.parametrize("method", names_inside(cls=True))
@pytest.mark.parametrize("name", ["clip_vision", "registers", "timm_registers", "open_clip"])
@torch.no_grad()
def test_every_method_inside_the_tower_runs(name, method):
    model, images = bare_models.build(name), bare_models.pixels()
    with patch(model, method, keep=0.4) as handle:
        got, last = embed(model, images), handle.last
        assert 9 <= min(last.tower_patches) <= 10  # token_clustering lays its own grid
        assert got.isfinite().all()
        # An image alone is what it is in a batch.
        torch.testing.assert_close(embed(model, images[1:2])[0], got[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(handle.kept[0], last.kept[1])


@pytest.mark.parametrize("name", ["registers", "timm_registers", "timm_avg_registers"])
@pytest.mark.parametrize("method", ["tome", "mctf", "pitome", "sta"])
@torch.no_grad()
def test_registers_are_never_reduced(name, method):
    model = bare_models.build(name)
    _, registers = plain_bare.prefix(model)
    with patch(model, method, keep=0.4) as handle:
        embed(model, bare_models.pixels())
        assert (handle.last.assignments[0] < 10).all()
        assert handle.last.tower_patches[-1] == 10
        assert handle.last.kept[0].max() < N
    assert registers >= 3


# --- what it is called ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "keep", "spec"),
    [
        (None, 0.5, "tome_tower:0.5"),
        ("tome", 0.5, "tome_tower:0.5"),
        ("pitome:0.5", None, "pitome_tower:0.5"),
        ("tome(r=3)", None, "tome_tower(r=3)"),
        (["tome"], 7, "tome_tower:7"),
        (CompressionConfig((StageConfig("pitome", 0.5),)), None, "pitome_tower:0.5"),
        (StageConfig("tome", 0.5), None, "tome_tower:0.5"),
        ("evit", 0.5, "evit:0.5"),
        (create("evit", fuse=False), 0.5, "evit(fuse=False):0.5"),
    ],
)
def test_merging_means_merging_inside(method, keep, spec):
    with patch(bare_models.build("clip"), method, keep=keep) as handle:
        assert handle.config.to_spec().replace(" ", "") == spec.replace(" ", "")
        handle.set(method="pitome", keep=0.7)
        assert handle.config.to_spec() == "pitome_tower:0.7"
        handle.set(keep=0.3)
        assert handle.config.to_spec() == "pitome_tower:0.3"


@torch.no_grad()
def test_the_report_tells_of_patches_and_costs():
    model = bare_models.build("timm_token")
    with patch(model, keep=0.4) as handle:
        assert "nothing has been compressed yet" in str(handle.report)
        embed(model, bare_models.pixels())
        text = str(handle.report)
        assert "25 -> 10 tokens/image, 3 image(s) (tome_tower:0.4)" in text
        assert "blocks of the tower:" in text
        assert "patches after each tower layer: 21, 17, 14, 10" in text
        assert "chosen by default" in text
        assert "positions" not in text
        assert "prompt" not in text
        model.forward_features(bare_models.pixels())
        assert "1 without (to the blocks, past the tower's forward: not reduced)" in str(
            handle.report
        )
        assert handle_of(model).report == handle.report
        assert repr(handle) == "Handle(VisionTransformer, 'tome_tower:0.4')"


@torch.no_grad()
def test_the_overlay_shows_what_was_dropped():
    from PIL import Image

    model, picture = bare_models.build("vit"), Image.new("RGB", (50, 50), (200, 0, 0))
    with patch(model, "evit(fuse=False)", keep=0.4) as handle:
        embed(model, bare_models.pixels(1))
        colours = handle.overlay(picture).getcolors()
    assert sorted(count for count, _ in colours) == [50 * 50 * 10 // 25, 50 * 50 * 15 // 25]


@torch.no_grad()
def test_flops_are_those_that_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    model, images = bare_models.build("vit_classifier", "eager"), bare_models.pixels()
    whole = 2 * 3 * (N * 3 * 8 * 8 * 32 + 32 * bare_models.CLASSES)
    with FlopCounterMode(display=False) as counter:
        embed(model, images)
    with patch(model, "sta", keep=0.4) as handle:
        embed(model, images)
        assert handle.last.tower_flops_before == counter.get_total_flops() - whole
        with FlopCounterMode(display=False) as counter:
            embed(model, images)
        counts = counter.get_flop_counts()
        parts = [
            sum(ops.values())
            for name, ops in counts.items()
            if name.startswith("ViTForImageClassification.vit.layers.")
            and name.endswith((".attention", ".mlp"))
        ]
        assert handle.last.tower_flops == sum(parts)
        assert handle.last.tower_flops < 0.9 * handle.last.tower_flops_before


# --- what is around it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["clip", "siglip", "open_clip", "open_clip_coca", "open_clip_timm"]
)
@torch.no_grad()
def test_the_text_tower_is_untouched(name):
    model, ids = bare_models.build(name), torch.randint(3, 49, (2, 8))

    def texts() -> Tensor:
        if hasattr(model, "encode_text"):
            return model.encode_text(ids)
        return model.get_text_features(ids).pooler_output

    want = texts()
    with patch(model, "tome", keep=0.4) as handle:
        assert torch.equal(texts(), want)
        assert handle.last is None
        assert not [n for n, _ in equalities.traces(model) if "text" in n]


@torch.no_grad()
def test_tokens_beside_the_embedding():
    model, images = bare_models.build("open_clip_tokens"), bare_models.pixels()
    whole, tokens = model.visual(images)
    with patch(model, "tome", keep=0.4):
        embedding, left = model.visual(images)
    assert embedding.shape == whole.shape
    assert tokens.shape[1] == N
    assert left.shape == (3, 10, tokens.shape[2])


@torch.no_grad()
def test_rows_that_leave_are_in_the_order_of_their_places():
    model, images = bare_models.build("clip_vision"), bare_models.pixels()
    whole = model(images).last_hidden_state
    with patch(model, "evit(fuse=False, layers=(-1,))", keep=0.4) as handle:
        left, kept = model(images).last_hidden_state, handle.kept
    rows = torch.stack([torch.cat([torch.tensor([0]), k + 1]) for k in kept])
    torch.testing.assert_close(left, torch.take_along_dim(whole, rows[..., None], 1))
    assert all((k.diff() > 0).all() for k in kept)


@torch.no_grad()
def test_a_mean_is_kept_by_merging():
    """Merging in the last block changes nothing that a mean of the rows would see."""
    model, images = bare_models.build("timm_avg"), bare_models.pixels()
    model.norm = torch.nn.Identity()
    model.blocks[-1].mlp = torch.nn.Identity()
    model.blocks[-1].norm2 = torch.nn.Identity()
    want = model(images)
    with patch(model, "tome_tower(layers=(-1,))", keep=0.6):
        torch.testing.assert_close(model(images), want, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_pixels():
    for name in ("clip", "siglip_vision", "registers_classifier", "timm_avg", "open_clip"):
        model, images = bare_models.build(name), bare_models.pixels().requires_grad_()
        with patch(model, "tome", keep=0.4):
            embed(model, images).square().sum().backward()
        assert (images.grad.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", ["clip", "siglip_vision", "timm_map", "open_clip", "vit"])
@torch.no_grad()
def test_half_precision(name):
    model, images = bare_models.build(name), bare_models.pixels()
    model, images = model.bfloat16(), images.bfloat16()
    with patch(model, "tome", keep=0.4) as handle:
        got = embed(model, images)
        assert got.dtype == torch.bfloat16
        assert got.isfinite().all()
        assert handle.last.tokens_after == (10, 10, 10)


@pytest.mark.parametrize("name", ["clip", "timm_avg", "open_clip_coca", "siglip_vision"])
@torch.no_grad()
def test_a_copy_is_patched_on_its_own(name):
    model, images = bare_models.build(name), bare_models.pixels()
    want = embed(model, images)
    handle = patch(model, "tome", keep=0.4)
    short = embed(model, images)
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(embed(model, images), want)
    assert torch.equal(embed(twin, images), short)
    assert handle_of(twin).report.calls_with_images == 2
    handle_of(twin).remove()
    assert torch.equal(embed(twin, images), want)
    assert equalities.traces(twin) == []


@torch.no_grad()
def test_threads_do_not_see_each_other():
    model = bare_models.build("open_clip_avg")
    images = {2: bare_models.pixels(2), 3: bare_models.pixels(3)}
    handle = patch(model, "tome", keep=0.4)
    want = {b: embed(model, x) for b, x in images.items()}
    failed: list[Any] = []

    @torch.no_grad()
    def work(b: int) -> None:
        for _ in range(20):
            same = torch.equal(embed(model, images[b]), want[b])
            if not same or handle.last.batch != b:
                failed.append(b)
        with handle.disabled():
            embed(model, images[b])

    threads = [threading.Thread(target=work, args=(b,)) for b in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    handle.remove()


@torch.no_grad()
def test_images_of_another_size():
    model = bare_models._timm(dynamic_img_size=True).eval()
    with patch(model, "tome", keep=0.5) as handle:
        model(torch.randn(1, 3, 32, 48))
        assert handle.last.grids == ((4, 6),)
        assert handle.last.tokens_after == (12,)
    model = bare_models.build("vit")
    with patch(model, "tome", keep=0.5) as handle:
        model(torch.randn(1, 3, 32, 48), interpolate_pos_encoding=True)
        assert handle.last.grids == ((4, 6),)
