"""TokenPacker, C-Abstractor, MQT and M3 against their rules written out, on tensors alone."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.compressors import (
    OUT,
    WIDTH,
    compressor,
    every_size,
    setting,
    shape_for,
    trained,
)
from vlmcompress.core.errors import (
    MissingExtraError,
)
from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods import create
from vlmcompress.methods.connector.c_abstractor import Abstractor
from vlmcompress.methods.connector.m3 import M3
from vlmcompress.methods.connector.mqt import MQT, Queries
from vlmcompress.methods.connector.tokenpacker import Packing
from vlmcompress.methods.trained import cell_grid

# --- tokenpacker


def packed_by_definition(parts: Packing, x: Tensor, deep: Tensor, size: Any, cells: Any) -> Tensor:
    """Cell by cell and head by head, without padding."""
    w, (rows, columns) = parts.state_dict(), cells
    width, heads = x.shape[-1], parts.config["heads"]

    def norm(name: str, values: Tensor) -> Tensor:
        return F.layer_norm(values, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def perceptron(name: str, values: Tensor) -> Tensor:
        inner = F.gelu(values @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"])
        return inner @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]

    shrunk = F.interpolate(
        x.view(*size, width).permute(2, 0, 1)[None], cells, mode="bilinear", align_corners=False
    )
    q = norm("ln_q_1", shrunk[0].permute(1, 2, 0) @ w["q_proj_1.weight"].T)
    key = norm("ln_k_1", perceptron("k_proj_1", deep)).view(*size, width)
    value = norm("ln_v_1", perceptron("v_proj_1", deep)).view(*size, width)
    projections = w["clip_attn.in_proj_weight"].chunk(3)
    biases = w["clip_attn.in_proj_bias"].chunk(3)
    out = []
    for i in range(rows):
        for j in range(columns):
            window = (
                slice(i * size[0] // rows, (i + 1) * size[0] // rows),
                slice(j * size[1] // columns, (j + 1) * size[1] // columns),
            )
            heads_of = [
                (values.reshape(-1, width) @ p.T + b).view(-1, heads, width // heads)
                for values, p, b in zip(
                    (q[i, j], key[window], value[window]), projections, biases, strict=True
                )
            ]
            mixed = []
            for head in range(heads):
                one, keys, values = (part[:, head] for part in heads_of)
                mixed.append((one @ keys.T / math.sqrt(width // heads)).softmax(-1) @ values)
            row = torch.cat(mixed, -1)[0]
            out.append(row @ w["clip_attn.out_proj.weight"].T + w["clip_attn.out_proj.bias"])
    return perceptron("mlp", torch.stack(out))


@every_size
@pytest.mark.parametrize("keep", [1, 4, 8, 12, 36])
def test_tokenpacker_attends_within_cells_of_any_size(size: tuple[int, int], keep: int):
    method, tokens = setting("tokenpacker", size)
    assert isinstance(tokens.parts, Packing)
    made = method.compress(tokens, keep).features
    deep = torch.cat(list(tokens.evidence.states.values()), -1)
    cells = cell_grid(size, min(keep, tokens.n))
    for i in range(3):
        want = packed_by_definition(tokens.parts, tokens.features[i], deep[i], size, cells)
        torch.testing.assert_close(made[i], want.detach())


def test_tokenpacker_without_layers_reads_what_the_connector_reads():
    method, tokens = setting("tokenpacker", (6, 6), layers=())
    assert method.needs().states == ()
    one, two = setting("tokenpacker", (6, 6), layers=(0,))
    alike = dataclasses.replace(two, features=tokens.features, evidence=tokens.evidence)
    alike = dataclasses.replace(alike, evidence=Evidence(states={0: tokens.features}))
    assert two.parts is not None
    assert tokens.parts is not None
    two.parts.load_state_dict(tokens.parts.state_dict())
    assert torch.equal(method.compress(tokens, 8).features, one.compress(alike, 8).features)


# --- c_abstractor


def test_c_abstractor_is_stages_around_pooling():
    method, tokens = setting("c_abstractor", (6, 6))
    parts = tokens.parts
    assert isinstance(parts, Abstractor)
    x = (tokens.features + parts.pos_emb).view(3, 6, 6, WIDTH).permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(parts.net["0"](x), (3, 2))  # 2 x 3 cells
    want = parts.readout(parts.net["2"](pooled).permute(0, 2, 3, 1).flatten(1, 2))
    torch.testing.assert_close(method.compress(tokens, 6).features, want)


def test_blocks_of_c_abstractor_by_definition():
    """Bottlenecks of depthwise convolutions with squeeze and excitation, as RegNet's."""
    method = compressor("c_abstractor", depth=1)
    parts = trained(method)
    assert isinstance(parts, Abstractor)
    w = {key.removeprefix("net.0.b1."): value for key, value in parts.state_dict().items()}

    def conv(name: str, x: Tensor, **more: Any) -> Tensor:
        x = F.conv2d(x, w[f"{name}.conv.weight"], **more).permute(0, 2, 3, 1)
        normed = F.layer_norm(x, x.shape[-1:], w[f"{name}.bn.weight"], w[f"{name}.bn.bias"])
        return normed.permute(0, 3, 1, 2)

    x = torch.randn(2, WIDTH, 5, 4, generator=torch.Generator().manual_seed(0))
    inner = F.silu(conv("conv2", F.silu(conv("conv1", x)), padding=1, groups=20))
    squeezed = F.silu(
        F.conv2d(inner.mean((2, 3), keepdim=True), w["se.fc1.weight"], w["se.fc1.bias"])
    )
    inner = inner * F.conv2d(squeezed, w["se.fc2.weight"], w["se.fc2.bias"]).sigmoid()
    want = F.silu(conv("conv3", inner) + conv("downsample", x))
    torch.testing.assert_close(parts.net["0"](x), want)


def test_positions_of_c_abstractor_are_resized_to_other_maps():
    method = compressor("c_abstractor")
    parts = trained(method)
    assert isinstance(parts, Abstractor)
    own = parts.positions((6, 6))
    assert torch.equal(own, parts.pos_emb.transpose(1, 2).reshape(1, WIDTH, 6, 6))
    larger = parts.positions((12, 18))
    assert larger.shape == (1, WIDTH, 12, 18)
    with torch.no_grad():
        parts.pos_emb.fill_(0.5)
    torch.testing.assert_close(parts.positions((3, 4)), torch.full((1, WIDTH, 3, 4), 0.5))


def test_c_abstractor_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    for module in [m for m in sys.modules if m.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "timm", None)
    method = compressor("c_abstractor")
    with pytest.raises(MissingExtraError, match=r"vlmcompress\[timm\]"):
        method.parts(shape_for(method))


# --- mqt


def queries_by_definition(parts: Queries, x: Tensor, size: tuple[int, int], k: int) -> Tensor:
    """The released code's arithmetic for one image, keys made of positions alone."""
    w, width = parts.state_dict(), x.shape[-1]
    heads, side = parts.config["heads"], math.isqrt(parts.config["max_tokens"])

    def norm(name: str, values: Tensor) -> Tensor:
        return F.layer_norm(values, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    table = w["pos_embed"].view(side, side, width).permute(2, 0, 1)[None]
    places = F.interpolate(table, size, mode="bicubic", align_corners=False)[0]
    read = (
        norm("ln_q", w["query"] + w["pos_embed"])[:k],
        norm("ln_k", places.flatten(1).T),
        norm("ln_v", x),
    )
    q, key, value = (
        (values @ p.T + b).view(len(values), heads, -1).transpose(0, 1)
        for values, p, b in zip(
            read, w["attn.in_proj_weight"].chunk(3), w["attn.in_proj_bias"].chunk(3), strict=True
        )
    )
    mixed = (q @ key.transpose(1, 2) / math.sqrt(width // heads)).softmax(-1) @ value
    rows = mixed.transpose(0, 1).flatten(1) @ w["attn.out_proj.weight"].T
    return (rows + w["attn.out_proj.bias"]) @ w["proj"]


@every_size
def test_mqt_as_released(size: tuple[int, int]):
    method, tokens = setting("mqt", size, faithful=True)
    assert isinstance(tokens.parts, Queries)
    for k in (1, 7):
        made = method.compress(tokens, k).features
        for i in range(3):
            want = queries_by_definition(tokens.parts, tokens.features[i], size, k)
            torch.testing.assert_close(made[i], want)


@pytest.mark.parametrize("faithful", [False, True])
def test_queries_are_nested(faithful: bool):
    method, tokens = setting("mqt", (6, 6), faithful=faithful)
    all_of_them = method.compress(tokens, 25).features
    for k in (1, 2, 9, 24):
        torch.testing.assert_close(method.compress(tokens, k).features, all_of_them[:, :k])


def test_keys_hold_the_image_unless_as_released():
    for faithful in (False, True):
        method, tokens = setting("mqt", (6, 6), faithful=faithful)
        assert isinstance(tokens.parts, Queries)
        _, weights = tokens.parts(tokens.features, (6, 6), 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 9))
        assert torch.allclose(weights[0], weights[1]) is faithful
        assert method.compress(tokens, 9).n == 9


def test_positions_of_mqt_are_sines():
    parts = Queries(8, OUT, 9, 1, False)
    for place in range(9):
        y, x = divmod(place, 3)
        want = [
            wave(where * 10000 ** -(i / 2))
            for where in (x, y)
            for wave in (math.sin, math.cos)
            for i in range(2)
        ]
        torch.testing.assert_close(parts.pos_embed[place], torch.tensor(want))


def test_counts_to_train_mqt_with():
    assert list(MQT().training_counts)[:2] == [2, 4]
    assert list(MQT().training_counts)[-1] == 256
    assert list(MQT(max_tokens=1).training_counts) == [1]
    assert list(MQT(max_tokens=9).training_counts) == [2, 4, 6, 8]


def test_channels_that_sines_do_not_fill_are_zero():
    even, odd = Queries(8, OUT, 9, 1, False), Queries(11, OUT, 9, 1, False)
    assert torch.equal(odd.pos_embed[:, :8], even.pos_embed)
    assert torch.equal(odd.pos_embed[:, 8:], torch.zeros(9, 3))
    assert Queries(3, OUT, 4, 1, False).pos_embed.abs().sum() == 0


# --- m3


def mapped(size: tuple[int, int], frames: int = 1) -> VisualTokens:
    n = frames * math.prod(size)
    features = torch.randn(2, n, 4, generator=torch.Generator().manual_seed(n))
    segments = (Segment("image", (frames, *size), slice(0, n)),)
    return VisualTokens.from_features(features, segments=segments)


@pytest.mark.parametrize(
    ("size", "scales"),
    [
        ((24, 24), [(24, 24), (12, 12), (6, 6), (3, 3), (1, 1)]),
        ((14, 14), [(14, 14), (7, 7), (1, 1)]),
        ((27, 27), [(27, 27), (9, 9), (3, 3), (1, 1)]),
        ((24, 18), [(24, 18), (12, 9), (4, 3), (1, 1)]),
        ((13, 7), [(13, 7), (1, 1)]),
        ((1, 9), [(1, 9), (1, 1)]),
        ((1, 1), [(1, 1)]),
    ],
)
def test_scales_of_m3(size: tuple[int, int], scales: list[tuple[int, int]]):
    assert M3.scales(size) == scales


def test_m3_takes_the_finest_scale_that_the_budget_pays_for():
    tokens, m3 = mapped((24, 24)), M3()
    for keep, side in ((1, 1), (8, 1), (9, 3), (35, 3), (36, 6), (58, 6), (0.1, 6), (0.3, 12)):
        made = m3.compress(tokens, keep)
        assert m3.tokens_kept(tokens.segments, keep) == made.n == side**2
        maps = tokens.features.view(2, 24, 24, 4).permute(0, 3, 1, 2)
        want = F.avg_pool2d(maps, 24 // side).flatten(2).transpose(1, 2)
        torch.testing.assert_close(made.features, want)
    assert m3.compress(tokens, 1.0) is tokens
    assert create("pool").tokens_kept(tokens.segments, 0.1) == 56


def test_tokens_of_m3_are_means_of_those_of_finer_scales():
    tokens, m3 = mapped((14, 14)), M3()
    finer = dataclasses.replace(mapped((7, 7)), features=m3.compress(tokens, 49).features)
    torch.testing.assert_close(
        m3.compress(finer, 1).features, m3.compress(tokens, 1).features, atol=1e-6, rtol=1e-5
    )


def test_frames_of_m3_have_one_scale():
    tokens, m3 = mapped((6, 6), frames=4), M3()
    assert m3.compress(tokens, 40).n == 4 * 9
    assert m3.compress(tokens, 35).n == 4
    assert m3.compress(tokens, 3).n == 3
