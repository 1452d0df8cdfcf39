"""Lookup, windowed and bus: what they compute, what they promise, what they refuse."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, layer_norm

from vlmcompress.core.errors import (
    ConfigError,
    ConfigTypeError,
    EvidenceError,
    MissingTextError,
)
from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods.connector.bus import BUS, Summary, matching_loss
from vlmcompress.methods.connector.lookup import Exchange, Lookup
from vlmcompress.methods.connector.uniform import Uniform
from vlmcompress.methods.connector.windowed import (
    Windowed,
    WindowPool,
    grids,
    refined_patch_embedding,
)
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.trained import ConnectorShape, LearnedCompressor

WIDTH, TEXT = 16, 6
SHAPE = ConnectorShape(width=WIDTH, out=24, levels=0, grid=(6, 6), tokens=9)
MAKE: dict[str, Any] = {
    "lookup": lambda **more: Lookup(**{"head_width": 4, **more}),
    "windowed": lambda **more: Windowed(**{"head_width": 4, **more}),
    "bus": lambda **more: BUS(**{"head_width": 4, "text_width": TEXT, **more}),
}
SIZES = [(6, 6), (5, 7), (1, 9), (10, 4), (1, 1)]
every_method = pytest.mark.parametrize("name", MAKE)
every_size = pytest.mark.parametrize("size", SIZES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts_of(method: LearnedCompressor, shape: ConnectorShape = SHAPE) -> Learned:
    parts = method.parts(shape)
    assert isinstance(parts, Learned)
    return parts


def shaken(parts: Learned) -> Learned:
    """Parts with other numbers, so that nothing is at its initial zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return parts


def images(
    size: tuple[int, int], parts: Learned | None, b: int = 3, text: int = TEXT
) -> VisualTokens:
    n = math.prod(size)
    asked = random(b, 2, text, seed=1)
    asked[0, 1] = 0  # a question of one part
    tokens = VisualTokens.from_features(
        random(b, n, WIDTH),
        segments=(Segment("image", (1, *size), slice(0, n)),),
        evidence=Evidence(text=asked),
    )
    return dataclasses.replace(tokens, parts=parts)


def setting(
    name: str, size: tuple[int, int] = (6, 6), **more: Any
) -> tuple[LearnedCompressor, VisualTokens]:
    method = MAKE[name](**more)
    return method, images(size, shaken(parts_of(method)))


def unit(tokens: VisualTokens, i: int) -> VisualTokens:
    return tokens.take_units(torch.tensor([i]))


# what all promise


@every_method
@every_size
def test_counts_and_what_rows_stand_for(name: str, size: tuple[int, int]):
    method, tokens = setting(name, size)
    for keep in (1, 2, 5, 7, 8, tokens.n, 900, 0.1, 0.5, 1.0):
        made = method.compress(tokens, keep)
        k = method.tokens_kept(tokens.segments, keep)
        assert made.features.shape == (3, k, WIDTH)
        assert bool(made.features.isfinite().all())
        assert bool((made.index.diff(dim=1) > 0).all())
        assert made.assignment is not None
        for row in range(3):
            rows = made.assignment[row]
            assert set(rows.tolist()) - {-1} == set(range(k))
            assert torch.equal(made.mass[row], torch.bincount(rows[rows >= 0]).float())
        assert torch.equal(made.assignment.gather(1, made.index), torch.arange(k).expand(3, -1))
        if name != "bus":
            assert bool((made.mass.sum(1) == tokens.n).all())


@every_method
@every_size
def test_a_batch_is_its_images_alone(name: str, size: tuple[int, int]):
    method, tokens = setting(name, size)
    together = method.compress(tokens, 0.3)
    for i in range(3):
        alone = method.compress(unit(tokens, i), 0.3)
        torch.testing.assert_close(together.features[i : i + 1], alone.features)
        assert torch.equal(together.index[i : i + 1], alone.index)
        assert torch.equal(together.assignment[i : i + 1], alone.assignment)


@every_method
def test_one_set_of_weights_serves_every_grid_and_count(name: str):
    method = MAKE[name]()
    others = [dataclasses.replace(SHAPE, **c) for c in ({"grid": None}, {"tokens": 2}, {"out": 8})]
    assert all(parts_of(method, s).config == parts_of(method).config for s in others)


@every_method
def test_gradients_reach_every_parameter_and_the_features(name: str):
    method, tokens = setting(name)
    tokens.features.requires_grad_()
    method.compress(tokens, 4).features.square().sum().backward()
    assert tokens.parts is not None
    for parameter_name, parameter in tokens.parts.named_parameters():
        assert parameter.grad is not None, parameter_name
        if not parameter_name.endswith("in_proj_bias"):  # a third of it cancels in the softmax
            assert bool(parameter.grad.abs().sum() > 0), parameter_name
    assert tokens.features.grad is not None
    assert bool(tokens.features.grad.abs().sum() > 0)


@every_method
def test_untrained_parts_can_be_trained(name: str):
    """Nothing that starts at zero keeps gradient from itself."""
    method = MAKE[name]()
    parts = parts_of(method)
    tokens, wanted = images((6, 6), parts), random(3, 4, WIDTH, seed=3)
    optimizer, losses = torch.optim.Adam(parts.parameters(), lr=0.01), []
    for _ in range(30):
        loss = (method.compress(tokens, 4).features - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_method
def test_half_precision_comes_in_and_goes_out_and_float32_computes(name: str):
    method, tokens = setting(name)
    half = dataclasses.replace(tokens, features=tokens.features.bfloat16())
    full = dataclasses.replace(tokens, features=tokens.features.bfloat16().float())
    made, want = method.compress(half, 4), method.compress(full, 4)
    assert made.features.dtype == torch.bfloat16
    assert torch.equal(made.features, want.features.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.compress(full, 4).features, want.features)


@every_method
def test_equal_seeds_are_equal_and_global_random_state_is_left_alone(name: str):
    state = torch.get_rng_state()
    one, same, other = (parts_of(MAKE[name](seed=seed)).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, same[n]) for n, value in one.items())
    assert any(not torch.equal(value, other[n]) for n, value in one.items())


@every_method
def test_saved_parts_come_back(name: str, tmp_path: Path):
    path = str(tmp_path / "parts.safetensors")
    method, tokens = setting(name)
    assert tokens.parts is not None
    tokens.parts.save(path)
    loaded = MAKE[name](weights=path)
    again = loaded.compress(dataclasses.replace(tokens, parts=parts_of(loaded)), 4)
    assert torch.equal(again.features, method.compress(tokens, 4).features)
    wide = dataclasses.replace(SHAPE, width=2 * WIDTH)
    with pytest.raises(ConfigError, match=r"made for.*width 16 instead of 32"):
        loaded.parts(wide)
    other = next(n for n in MAKE if n != name)
    with pytest.raises(ConfigError, match=f"made for.*method '{name}' instead of '{other}'"):
        MAKE[other](weights=path).parts(SHAPE)


@pytest.mark.parametrize(
    ("name", "option", "value", "error"),
    [
        ("lookup", "depth", 0, ConfigError),
        ("lookup", "wide", 0, ConfigError),
        ("lookup", "narrow", "x", ConfigTypeError),
        ("lookup", "head_width", 0, ConfigError),
        ("windowed", "stages", 0, ConfigError),
        ("windowed", "blocks", -1, ConfigError),
        ("windowed", "head_width", 1.5, ConfigTypeError),
        ("bus", "extracted", 1.5, ConfigError),
        ("bus", "depth", 0, ConfigError),
        ("bus", "text_width", 0, ConfigError),
        ("lookup", "tokens", 0, ConfigError),
        ("bus", "seed", -1, ConfigError),
        ("windowed", "weights", 3, ConfigTypeError),
    ],
)
def test_options_are_checked(name: str, option: str, value: Any, error: type[Exception]):
    with pytest.raises(error, match=option):
        MAKE[name](**{option: value})


@every_method
def test_a_budget_of_its_own(name: str):
    assert not MAKE[name]().own_budget
    assert MAKE[name](tokens=4).own_budget


@every_method
def test_without_parts_nothing_is_done(name: str):
    tokens = images((6, 6), None)
    with pytest.raises(EvidenceError, match="trained parts"):
        MAKE[name]().compress(tokens, 4)
    with pytest.raises(EvidenceError, match="trained parts"):
        MAKE[name]().compress(dataclasses.replace(tokens, parts=Learned(method="other")), 4)


@pytest.mark.parametrize("name", ["lookup", "windowed"])
def test_maps_must_be_whole(name: str):
    method, tokens = setting(name)
    with pytest.raises(ConfigError, match="earlier method left 9 of 36"):
        method.compress(Uniform().compress(tokens, 9), 4)
    two = (Segment("base", (1, 3, 6), slice(0, 18)), Segment("tile", (1, 3, 6), slice(18, 36)))
    with pytest.raises(ConfigError, match="one rectangle"):
        method.compress(dataclasses.replace(tokens, segments=two), 4)
    with pytest.raises(ConfigError, match="one rectangle"):
        method.tokens_kept(two, 4)


# lookup


def test_lookup_starts_as_the_smaller_image():
    tokens = images((6, 6), parts_of(Lookup(head_width=4)))
    made = Lookup(head_width=4).compress(tokens, 4).features
    pixels = tokens.features.transpose(1, 2).reshape(3, WIDTH, 6, 6)
    want = interpolate(pixels, (2, 2), mode="bilinear", antialias=True)
    torch.testing.assert_close(made, want.flatten(2).transpose(1, 2))


def attention(similarity: Tensor, values: Tensor, heads: int) -> Tensor:
    """Head by head, in the plainest way."""
    width = values.shape[1] // heads
    parts = [
        similarity[h].softmax(1) @ values[:, h * width : (h + 1) * width] for h in range(heads)
    ]
    return torch.cat(parts, 1)


@torch.no_grad()
def test_a_lookup_block_is_its_definition():
    """In float64, with one similarity for both directions."""
    block = Exchange(8, 2, 16, 4).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in block.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    c, x = random(3, 8).double(), random(7, 8, seed=1).double()
    got = [rows[0] for rows in block(c[None], x[None])]

    def normed(module: torch.nn.LayerNorm, rows: Tensor) -> Tensor:
        return layer_norm(rows, (8,), module.weight, module.bias)

    seen = normed(block.norm_lookup, x)
    q, k = block.query(normed(block.norm_compressed, c)), block.key(seen)
    similarity = torch.stack([q[:, :4] @ k[:, :4].T, q[:, 4:] @ k[:, 4:].T]) / 2
    c = c + block.gathered(attention(similarity, block.gather(seen), 2))
    inner = block.refine.self_attn
    z = normed(block.refine.norm1, c)
    wq, wk, wv = (z @ w.T + b for w, b in zip(
        inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3), strict=True
    ))  # fmt: skip
    own = torch.stack([wq[:, :4] @ wk[:, :4].T, wq[:, 4:] @ wk[:, 4:].T]) / 2
    c = c + inner.out_proj(attention(own, wv, 2))
    hidden = torch.nn.functional.gelu(block.refine.linear1(normed(block.refine.norm2, c)))
    c = c + block.refine.linear2(hidden)
    assert block.infuse is not None
    value = block.infuse["value"](normed(block.infuse["norm"], c))
    x = x + block.infuse["out"](attention(similarity.transpose(1, 2), value, 2))
    x = x + block.infuse["perceptron"](x)
    torch.testing.assert_close(got[0], c)
    torch.testing.assert_close(got[1], x)


def test_the_last_lookup_block_leaves_lookup_tokens_alone():
    parts = parts_of(Lookup(head_width=4, depth=3))
    assert [block.infuse is None for block in parts.blocks] == [False, False, True]


# windowed


@pytest.mark.parametrize(
    ("size", "cells", "stages", "want"),
    [
        ((24, 24), (6, 6), 2, [(12, 12), (6, 6)]),
        ((24, 24), (3, 3), 3, [(12, 12), (6, 6), (3, 3)]),
        ((24, 24), (7, 8), 2, [(14, 16), (7, 8)]),
        ((5, 7), (3, 4), 2, [(3, 4), (3, 4)]),
        ((6, 6), (6, 6), 2, [(6, 6), (6, 6)]),
        ((1, 9), (1, 1), 2, [(1, 3), (1, 1)]),
    ],
)
def test_grids_shrink_evenly_and_nest(
    size: tuple[int, int], cells: tuple[int, int], stages: int, want: list[tuple[int, int]]
):
    assert grids(size, cells, stages) == want


@pytest.mark.parametrize("stages", [1, 2])
def test_windowed_starts_as_average_pooling(stages: int):
    method = Windowed(head_width=4, stages=stages)
    tokens = images((6, 6), parts_of(method))
    pixels = tokens.features.transpose(1, 2).reshape(3, WIDTH, 6, 6)
    want = adaptive_avg_pool2d(pixels, 1 if stages == 2 else 2).flatten(2).transpose(1, 2)
    made = method.compress(tokens, 1 if stages == 2 else 4).features
    torch.testing.assert_close(made, want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_windows_are_weighed_by_a_softmax_of_their_own():
    """Uneven windows by definition: tokens of other windows and of no window count for nothing."""
    pool = WindowPool(4)
    generator = torch.Generator().manual_seed(3)
    for parameter in pool.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = random(1, 15, 4)
    got = pool(x, (3, 5), (2, 2))
    members = [[0, 1], [2, 3, 4], [5, 6, 10, 11], [7, 8, 9, 12, 13, 14]]
    for cell, tokens in enumerate(members):
        own = x[0, tokens]
        beside = pool.norm(torch.cat([own, own.mean(0).expand_as(own)], 1))
        weights = pool.down(torch.nn.functional.gelu(pool.up(beside))).softmax(0)
        torch.testing.assert_close(got[0, cell], (weights * own).sum(0))


def resize_of(size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """The matrix of the resize, column by column."""
    pixels = torch.eye(math.prod(size), dtype=torch.float64).reshape(-1, 1, *size)
    return interpolate(pixels, to, mode="bilinear", antialias=True).flatten(1).T


@pytest.mark.parametrize("patch", [(4, 4), (3, 5), (8, 8), (12, 9)])
def test_refined_patches_are_embedded_as_nearly_as_before_as_can_be(patch: tuple[int, int]):
    weight = random(5, 3, 8, 8).double()
    refined = refined_patch_embedding(weight, patch)
    assert refined.shape == (5, 3, *patch)
    resize = resize_of((8, 8), patch)
    left = weight.flatten(2) - refined.flatten(2) @ resize
    # What is left of the old weights is nothing that any weights of the new size could give.
    torch.testing.assert_close(left @ resize.T, torch.zeros(5, 3, math.prod(patch)).double())
    if min(patch) >= 8:
        torch.testing.assert_close(left, torch.zeros_like(left))
    if max(patch) <= 8:  # old weights that are new ones resized give these back
        coarse = (refined.flatten(2) @ resize).reshape(weight.shape)
        torch.testing.assert_close(refined_patch_embedding(coarse, patch), refined)
    assert refined_patch_embedding(weight.bfloat16(), patch).dtype == torch.bfloat16


def test_patches_that_cannot_be_refined():
    for weight, patch in ((random(5, 192), (4, 4)), (random(5, 3, 8, 8), (0, 4))):
        with pytest.raises(ConfigError, match="cannot be made"):
            refined_patch_embedding(weight, patch)


# bus


def test_bus_starts_as_the_patches_that_match_best():
    method = BUS(head_width=4, text_width=TEXT)
    parts = parts_of(method)
    assert isinstance(parts, Summary)
    tokens = images((6, 6), parts)
    made = method.compress(tokens, 5)
    logits = parts.logits(tokens.features, tokens.evidence.text)
    want = logits.topk(5).indices.sort(1).values
    assert torch.equal(made.index, want)
    assert torch.equal(made.features, tokens.features[torch.arange(3)[:, None], want])


@pytest.mark.parametrize(("extracted", "m"), [(0.5, 18), (0.0, 5), (1.0, 36), (0.2, 7)])
def test_rows_of_bus_count_for_the_extracted_patches(extracted: float, m: int):
    method, tokens = setting("bus", extracted=extracted)
    made = method.compress(tokens, 5)
    assert made.mass.sum(1).tolist() == [m] * 3
    parts = tokens.parts
    assert isinstance(parts, Summary)
    best = parts.logits(tokens.features, tokens.evidence.text).topk(m).indices
    for row in range(3):
        assert set(best[row].tolist()) == set((made.assignment[row] >= 0).nonzero()[:, 0].tolist())


def test_the_question_chooses():
    method, tokens = setting("bus")
    other = dataclasses.replace(tokens, evidence=Evidence(text=-tokens.evidence.text))
    assert not torch.equal(method.compress(tokens, 5).index, method.compress(other, 5).index)


def test_rows_of_zeros_are_no_part_of_the_question():
    method, tokens = setting("bus")
    more = torch.cat([tokens.evidence.text, torch.zeros(3, 2, TEXT)], 1)
    padded = dataclasses.replace(tokens, evidence=Evidence(text=more))
    assert torch.equal(method.compress(padded, 5).features, method.compress(tokens, 5).features)


def test_bus_works_behind_other_methods():
    method, tokens = setting("bus")
    made = method.compress(Uniform().compress(tokens, 12), 3)
    assert made.features.shape == (3, 3, WIDTH)
    assert made.assignment is not None
    assert made.assignment.shape == (3, 36)
    assert made.mass.sum(1).tolist() == [6, 6, 6]


def test_bus_needs_a_question_of_the_width_it_was_made_for():
    method, tokens = setting("bus")
    assert method.needs().text
    with pytest.raises(MissingTextError, match="none was given"):
        method.compress(dataclasses.replace(tokens, evidence=Evidence()), 5)
    with pytest.raises(ConfigError, match=r"bus\(text_width=9\)"):
        method.compress(images((6, 6), tokens.parts, text=9), 5)


def test_answers_train_the_selector():
    method, tokens = setting("bus")
    parts = tokens.parts
    assert isinstance(parts, Summary)
    method.compress(tokens, 5).features.square().sum().backward()
    assert bool(parts.match[0].weight.grad.abs().sum() > 0)
    assert bool(parts.about.weight.grad.abs().sum() > 0)


def test_matching_teaches_which_patches_a_text_is_about():
    method = BUS(head_width=4, text_width=TEXT)
    parts = parts_of(method)
    tokens, inside = images((6, 6), parts), torch.zeros(3, 36)
    for row, first in enumerate((0, 12, 24)):
        inside[row, first : first + 5] = 1
    optimizer = torch.optim.Adam(parts.parameters(), lr=0.02)
    for _ in range(60):
        loss = matching_loss(parts, tokens.features, tokens.evidence.text, inside)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = method.compress(tokens, 5).index
    assert kept.tolist() == [list(range(first, first + 5)) for first in (0, 12, 24)]
    with pytest.raises(ConfigTypeError, match=r"handle\.parts"):
        matching_loss(parts_of(Lookup(head_width=4)), tokens.features, tokens.evidence.text, inside)
