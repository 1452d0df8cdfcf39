"""Parts of methods that rewrite the prompt: what they compute, their files, released layouts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from vlmcompress.core.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedInputError,
)
from vlmcompress.methods.layouts import Layout, layout, load_released
from vlmcompress.methods.learned import Learned, fresh
from vlmcompress.methods.prompt.llava_mini import Fusible, Fusion, Resampler, causal, places
from vlmcompress.methods.prompt.quecc import QueryCondenser, kernel_for, last_states
from vlmcompress.methods.prompt.voco_llama import Blocks, VocoTokens

FIXTURES = Path(__file__).parent / "parity"
LLM = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attn_implementation="sdpa",
)


@pytest.fixture(scope="module")
def llm() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(LLM).eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(parts: Learned, seed: int = 7) -> Learned:
    """Parts with other numbers, so that nothing is at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return parts


def fixture(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Inputs, weights by the names of the released code, and the output."""
    with np.load(FIXTURES / f"{name}.npz") as data:
        arrays = {key: torch.from_numpy(data[key]) for key in data.files if key != "meta"}
    weights = {
        key.removeprefix("in_w__").replace("__", "."): value
        for key, value in arrays.items()
        if key.startswith("in_w__")
    }
    inputs = {key.removeprefix("in_"): v for key, v in arrays.items() if key.startswith("in_")}
    return inputs, weights, arrays.get("out_output", torch.empty(0))


# QueCC


def condenser(grid: tuple[int, int] = (6, 6), cells: tuple[int, int] = (3, 3), **more: Any):
    made = fresh(lambda: QueryCondenser(16, 2, 10, kernel_for(grid, cells), 4), **more)
    return shaken(made) if not more.get("weights") else made


def asked(b: int, size: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    n = size[0] * size[1]
    return (
        random(b, n, 16, seed=seed),
        random(b, n, 32, seed=seed + 1),
        random(b, 10, seed=seed + 2),
    )


SEEDED: dict[str, Any] = {"seed": 0, "weights": None}
GRIDS = [((6, 6), (3, 3)), ((6, 6), (6, 6)), ((6, 6), (1, 1)), ((5, 7), (3, 4)), ((4, 9), (4, 5))]


@pytest.mark.parametrize(("size", "cells"), GRIDS)
def test_quecc_takes_every_grid_and_count(size: tuple[int, int], cells: tuple[int, int]):
    parts, inputs = condenser(**SEEDED), asked(3, size)
    made = parts(*inputs, size, cells)
    assert made.shape == (3, cells[0] * cells[1], 16)
    for i in range(3):
        alone = parts(*(x[i : i + 1] for x in inputs), size, cells)
        torch.testing.assert_close(made[i : i + 1], alone)


def test_quecc_looks_at_its_own_cell_and_at_the_question():
    parts, (x, levels, text) = condenser(**SEEDED), asked(1, (6, 6))
    before = parts(x, levels, text, (6, 6), (3, 3))
    levels = levels.clone()
    levels[:, 0] += 1  # the patch in the upper left corner
    changed = (parts(x, levels, text, (6, 6), (3, 3)) - before).abs().amax(2)[0] > 1e-6
    assert changed.tolist() == [True] + [False] * 8
    other = parts(x, levels, text + 1, (6, 6), (3, 3))
    assert bool(((other - before).abs().amax(2) > 1e-6).all())


def test_quecc_trains_every_parameter():
    parts = condenser(**SEEDED)
    parts(*asked(2, (6, 6)), (6, 6), (3, 3)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parts.parameters())


def test_quecc_computes_in_float32():
    parts, inputs = condenser(**SEEDED), asked(1, (6, 6))
    half = parts(*(x.bfloat16() for x in inputs), (6, 6), (3, 3))
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, parts(*(x.bfloat16().float() for x in inputs), (6, 6), (3, 3)), atol=0, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, levels, text: (x[:, :-1], levels, text), "features"),
        (lambda x, levels, text: (x[..., :-1], levels, text), "features"),
        (lambda x, levels, text: (x, levels[..., :-1], text), "states"),
        (lambda x, levels, text: (x, levels, text[:, :-1]), "question"),
        (lambda x, levels, text: (x, levels, text[None]), "question"),
    ],
)
def test_quecc_refuses_what_does_not_fit(change: Callable[..., Any], match: str):
    with pytest.raises(UnsupportedInputError, match=f"quecc's {match}"):
        condenser(**SEEDED)(*change(*asked(1, (6, 6))), (6, 6), (3, 3))
    with pytest.raises(UnsupportedInputError, match="do not fit"):
        condenser(**SEEDED)(*asked(1, (6, 6)), (6, 6), (7, 3))
    with pytest.raises(ConfigError, match="heads"):
        QueryCondenser(16, 1, 8, (2, 2), 3)


@pytest.mark.parametrize("padded", ["left", "right", "none"])
def test_the_question_is_its_last_token(padded: str):
    hidden, mask = random(2, 5, 3), torch.ones(2, 5, dtype=torch.long)
    if padded == "left":
        mask[0, :2] = 0
    if padded == "right":
        mask[0, 3:] = 0
    last = 2 if padded == "right" else 4
    assert torch.equal(last_states(hidden, mask), torch.stack([hidden[0, last], hidden[1, 4]]))
    mask[1] = 0
    with pytest.raises(UnsupportedInputError, match="at least one token"):
        last_states(hidden, mask)


# LLaVA-Mini


def run(llm: LlamaModel) -> Callable[[Any, Tensor, Tensor, Tensor], Tensor]:
    """How layers of Llama are called."""

    def one(layer: Any, rows: Tensor, allowed: Tensor, positions: Tensor) -> Tensor:
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        turned = llm.rotary_emb(rows, positions)
        out = layer(rows, attention_mask=bias, position_ids=positions, position_embeddings=turned)
        return out if isinstance(out, Tensor) else out[0]

    return one


def fusion(llm: LlamaModel, grid: tuple[int, int] = (1, 2), **more: Any) -> Fusion:
    def make() -> Fusion:
        return Fusion(8, 16, grid, lambda: copy.deepcopy(llm.layers[:2]), heads=2)

    return fresh(make, **{**SEEDED, **more})


def prompts(b: int = 2, v: int = 5, c: int = 2, t: int = 6) -> Fusible:
    every = [torch.ones(b, n, dtype=torch.bool) for n in (v, c, t)]
    return Fusible(
        random(b, v, 16), every[0], random(b, c, 16, seed=1), every[1], random(b, t, 16, seed=2),
        every[2],
    )  # fmt: skip


@pytest.mark.parametrize(("grid", "size"), [((1, 1), (6, 6)), ((2, 3), (5, 4)), ((3, 3), (3, 3))])
def test_the_resampler_takes_every_grid(grid: tuple[int, int], size: tuple[int, int]):
    resampler, x = Resampler(8, grid, 2), random(3, size[0] * size[1], 8)
    rows, attention = resampler(x, size)
    assert rows.shape == (3, grid[0] * grid[1], 8)
    torch.testing.assert_close(attention.sum(2), torch.ones(attention.shape[:2]))
    torch.testing.assert_close(rows[1:2], resampler(x[1:2], size)[0])
    assert resampler(x.bfloat16(), size)[0].dtype == torch.float32
    with pytest.raises(UnsupportedInputError, match="whole"):
        resampler(x, (size[0], size[1] + 1))


@pytest.mark.parametrize(("width", "heads"), [(10, 2), (12, 8)])
def test_the_resampler_refuses_widths_that_do_not_fit(width: int, heads: int):
    with pytest.raises(ConfigError, match="width"):
        Resampler(width, (1, 1), heads)


def test_fusion_is_the_layers_over_vision_compressed_and_text(llm: LlamaModel):
    parts, prompt = fusion(llm), prompts()
    compressed, text = parts.fuse(prompt, run(llm))
    whole = LlamaModel(LLM).eval()
    whole.layers, whole.norm = parts.prefusion_layers, torch.nn.Identity()
    rows = torch.cat([prompt.vision, prompt.compressed, prompt.text], 1)
    want = whole(inputs_embeds=rows, use_cache=False).last_hidden_state
    torch.testing.assert_close(compressed, want[:, 5:7], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text, want[:, 7:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_prompts_alone(llm: LlamaModel, side: str):
    parts, prompt = fusion(llm), prompts()
    for taking in (prompt.seen, prompt.filled, prompt.asking):
        taking[0, slice(0, 1) if side == "left" else slice(-1, None)] = False
    compressed, text = parts.fuse(prompt, run(llm))
    cut = slice(1, None) if side == "left" else slice(None, -1)
    alone = Fusible(
        prompt.vision[:1, cut], prompt.seen[:1, cut], prompt.compressed[:1, cut],
        prompt.filled[:1, cut], prompt.text[:1, cut], prompt.asking[:1, cut],
    )  # fmt: skip
    rows, words = parts.fuse(alone, run(llm))
    torch.testing.assert_close(compressed[:1, cut], rows, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text[:1, cut], words, atol=1e-5, rtol=1e-4)
    assert torch.equal(text[0][~prompt.asking[0]], prompt.text[0][~prompt.asking[0]])


def test_answers_are_neither_fused_nor_seen(llm: LlamaModel):
    parts, prompt = fusion(llm), prompts(1)
    prompt.asking[0, 2:4] = False  # an answer with a question behind it
    compressed, text = parts.fuse(prompt, run(llm))
    assert torch.equal(text[0, 2:4], prompt.text[0, 2:4])
    prompt.text[0, 2:4] += 1
    again, changed = parts.fuse(prompt, run(llm))
    assert torch.equal(again, compressed)
    assert torch.equal(changed[0, 4:], text[0, 4:])


def test_prompts_without_an_image_stay_as_they_are(llm: LlamaModel):
    prompt = prompts()
    prompt.seen[0], prompt.filled[0] = False, False
    _, text = fusion(llm).fuse(prompt, run(llm))
    assert torch.equal(text[0], prompt.text[0])
    assert not torch.allclose(text[1], prompt.text[1])
    assert bool(text.isfinite().all())


def test_fusion_trains_compressor_and_layers_and_leaves_the_llm_alone(llm: LlamaModel):
    parts, prompt, before = fusion(llm), prompts(), copy.deepcopy(llm.state_dict())
    rows, _ = parts.compressor(random(2, 6, 8), (2, 3))
    project = torch.nn.Linear(8, 16)
    prompt = Fusible(
        prompt.vision, prompt.seen, project(rows), prompt.filled, prompt.text, prompt.asking
    )
    compressed, text = parts.fuse(prompt, run(llm))
    (compressed.square().sum() + text.square().sum()).backward()
    for name, parameter in parts.named_parameters():
        if name != "compressor.pos_embed":
            assert parameter.grad is not None, name
    assert all(p.grad is None for p in llm.parameters())
    assert all(torch.equal(value, before[name]) for name, value in llm.state_dict().items())


def test_fusion_returns_the_dtype_of_the_text(llm: LlamaModel):
    prompt = prompts()
    half = Fusible(
        prompt.vision.bfloat16(), prompt.seen, prompt.compressed, prompt.filled,
        prompt.text.bfloat16(), prompt.asking,
    )  # fmt: skip
    compressed, text = fusion(llm).fuse(half, run(llm))
    assert compressed.dtype == text.dtype == torch.bfloat16


def test_places_count_what_takes_part():
    taking = torch.tensor([[0, 1, 1, 0, 1]]).bool()
    assert places(taking).tolist() == [[0, 0, 1, 1, 2]]
    seen = causal(taking)[0, 0]
    assert seen.tolist()[4] == [False, True, True, False, True]
    assert seen.tolist()[0] == [True, False, False, False, False]


# VoCo-LLaMA


def test_the_mask_is_the_released_one():
    with np.load(FIXTURES / "voco_mask.npz") as data:
        marked, wanted = (torch.from_numpy(data[k]) for k in ("in_marked", "out_allowed"))
        voco = marked == int(data["in_voco_id"])
    assert torch.equal(Blocks.released(voco).visible().long(), wanted)


def layouts_of_rows() -> list[tuple[list[int], list[int], list[int]]]:
    """Per row: the image it belongs to, whether it compresses, whether it is valid."""
    return [
        ([1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0], [1] * 8),  # as released
        ([0, 0, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1, 0], [0] + [1] * 7),  # line break, padding
        ([0, 1, 1, 1, 0, 2, 2, 0], [0, 0, 0, 1, 0, 0, 1, 0], [1] * 8),  # two images
        ([0] * 8, [0] * 8, [0, 0, 1, 1, 1, 1, 1, 1]),  # none
    ]


def test_rows_see_what_their_place_allows():
    image, voco, valid = (torch.tensor(x) for x in zip(*layouts_of_rows(), strict=True))
    blocks = Blocks.of(image, voco.bool(), valid.bool())
    allowed = blocks.allowed()[:, 0]
    for b in range(4):
        for q in range(8):
            for k in range(8):
                own = int(blocks.number[b, q]) == int(blocks.number[b, k])
                summary = int(blocks.number[b, q]) == 0 and bool(voco[b, k])
                want = q == k or (k < q and bool(valid[b, k]) and (own or summary))
                assert bool(allowed[b, q, k]) == want, (b, q, k)
    assert blocks.number.tolist()[1] == [0, 0, 1, 1, 1, 1, 1, 0]
    assert blocks.kept().long().tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 1],
        [0, 1, 0, 0, 0, 0, 1, 1],
        [1, 0, 0, 1, 1, 0, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1],
    ]
    assert blocks.positions().tolist()[1] == [0, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("image", "voco", "match"),
    [
        ([1, 2, 1, 2], [0, 0, 1, 1], "between each other"),
        ([1, 1, 0, 0], [0, 0, 0, 1], "belongs to no image"),
        ([1, 1, 1, 0], [0, 1, 0, 0], "behind its compression tokens"),
    ],
)
def test_layouts_that_cannot_be_worked_on_are_refused(
    image: list[int], voco: list[int], match: str
):
    with pytest.raises(UnsupportedInputError, match=match):
        Blocks.of(torch.tensor([image]), torch.tensor([voco]).bool())


def bias(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def masked(llm: LlamaModel, rows: Tensor, blocks: Blocks, start: int = 0, **more: Any) -> Any:
    return llm(
        inputs_embeds=rows,
        attention_mask=bias(blocks.allowed()),
        position_ids=blocks.positions() + start,
        **more,
    )


def test_text_never_depends_on_patches_but_through_compression_tokens(llm: LlamaModel):
    image, voco = torch.tensor([[0, 1, 1, 1, 0, 0]]), torch.tensor([[0, 0, 0, 1, 0, 0]]).bool()
    blocks, rows = Blocks.of(image, voco), random(1, 6, 16)
    rows.requires_grad_()
    masked(llm, rows, blocks).last_hidden_state[0, 4:].square().sum().backward()
    assert bool(rows.grad[0, 1:3].abs().sum() > 0)  # through the token that compresses
    llm_blind = Blocks.of(image, torch.zeros_like(voco))
    rows.grad = None
    masked(llm, rows, llm_blind).last_hidden_state[0, 4:].square().sum().backward()
    assert bool((rows.grad[0, 1:4] == 0).all())


def test_compression_tokens_are_the_same_for_every_image():
    parts = fresh(lambda: VocoTokens(3, 16), 0, None)
    rows = parts.rows(4, torch.bfloat16)
    assert rows.shape == (4, 3, 16)
    assert rows.dtype == torch.bfloat16
    rows.float().sum().backward()
    torch.testing.assert_close(parts.embed_tokens.weight.grad, torch.full((3, 16), 4.0))


# files of our own

MAKE: dict[str, Callable[[LlamaModel], Callable[[], Learned]]] = {
    "quecc": lambda llm: lambda: QueryCondenser(16, 2, 10, (2, 2), 4),
    "llava_mini": lambda llm: (
        lambda: Fusion(8, 16, (1, 2), lambda: copy.deepcopy(llm.layers[:2]), 2)
    ),
    "voco_llama": lambda llm: lambda: VocoTokens(2, 16),
}
OTHER: dict[str, Callable[[LlamaModel], Callable[[], Learned]]] = {
    "quecc": lambda llm: lambda: QueryCondenser(16, 2, 10, (3, 2), 4),
    "llava_mini": lambda llm: (
        lambda: Fusion(8, 16, (2, 2), lambda: copy.deepcopy(llm.layers[:2]), 2)
    ),
    "voco_llama": lambda llm: lambda: VocoTokens(2, 12),
}


@pytest.mark.parametrize("name", MAKE)
def test_saved_parts_come_back_and_others_refuse_them(llm: LlamaModel, tmp_path: Path, name: str):
    path, make = tmp_path / "parts.safetensors", MAKE[name](llm)
    parts = shaken(fresh(make, 0, None))
    parts.save(path)
    state = torch.get_rng_state()
    again = fresh(make, 1, str(path))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in parts.state_dict().items())
    assert again.config["method"] == name
    with pytest.raises(ConfigError, match="was made for"):
        fresh(OTHER[name](llm), 0, str(path))


@pytest.mark.parametrize("name", MAKE)
def test_equal_seeds_make_equal_parts(llm: LlamaModel, name: str):
    one, same, other = (fresh(MAKE[name](llm), seed, None).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(v, same[n]) for n, v in one.items())
    assert any(not torch.equal(v, other[n]) for n, v in one.items())


# released layouts: names, shapes and dtypes verified


def checkpoint(
    plan: Layout, sizes: dict[str, int], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A file of exactly the released layout with given numbers, and zeros where there are none."""
    dtype = getattr(torch, plan.dtype)
    made = {name: torch.zeros(shape, dtype=dtype) for name, shape in plan.shapes(sizes).items()}
    for name, value in weights.items():
        assert made[plan.prefix + name].shape == value.shape, name
        made[plan.prefix + name] = value.contiguous()  # float32, to compare with the numbers
    return made


QUECC = {"quecc_a": {"width": 32, "levels": 64, "text": 48, "kernel": 4},
         "quecc_b": {"width": 32, "levels": 64, "text": 48, "kernel": 2}}  # fmt: skip


@pytest.mark.parametrize("case", QUECC)
def test_quecc_of_a_released_file_computes_the_released_numbers(tmp_path: Path, case: str):
    inputs, weights, want = fixture(case)
    sizes, plan = QUECC[case], layout("quecc")
    assert set(weights) == set(plan.tensors)
    path = tmp_path / "model.safetensors"
    save_file({**checkpoint(plan, sizes, weights), "lm_head.weight": torch.ones(2)}, str(path))
    k, side = sizes["kernel"], int(inputs["x"].shape[1] ** 0.5)
    parts = QueryCondenser(32, 2, 48, (k, k), int(inputs["num_heads"]))
    load_released(parts, tmp_path)
    got = parts(
        inputs["x"], inputs["x_multi"], inputs["text"][:, 0], (side, side), (side // k, side // k)
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_llava_mini_of_a_released_folder_computes_the_released_numbers(
    llm: LlamaModel, tmp_path: Path
):
    inputs, weights, want = fixture("llava_mini_resampler")
    sizes = {"width": 32, "queries": 4, "out": 16, "keys": 8, "hidden": 24, "fusion": 2}
    weights = {f"compressor.{name}": value for name, value in weights.items()}
    layers = llm.layers[1:].state_dict()
    weights |= {f"prefusion_layers.{name}": value for name, value in layers.items()}
    made = checkpoint(layout("llava_mini"), sizes, weights)
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(made)}
    for shard in set(shards.values()):
        save_file({n: t for n, t in made.items() if shards[n] == shard}, str(tmp_path / shard))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**shards, "x": "absent.safetensors"}}))
    parts = Fusion(32, 16, (2, 2), lambda: copy.deepcopy(llm.layers[:2]), int(inputs["num_heads"]))
    load_released(parts, tmp_path)
    got, _ = parts.compressor(inputs["x"], (6, 6))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    for name, value in parts.prefusion_layers.state_dict().items():
        assert torch.equal(value, layers[name])


def test_sine_places_are_those_of_the_released_file():
    _, weights, _ = fixture("llava_mini_resampler")
    torch.testing.assert_close(Resampler(32, (2, 2), 4).pos_embed, weights["pos_embed"])


def test_the_released_compression_token_is_taken_from_its_table(tmp_path: Path):
    sizes = {"vocabulary": 32001, "width": 16}
    table = random(32001, 16)
    path = tmp_path / "model.safetensors"
    save_file(checkpoint(layout("voco_llama"), sizes, {"embed_tokens.weight": table}), str(path))
    parts = VocoTokens(3, 16)
    load_released(parts, path)
    assert torch.equal(parts.embed_tokens.weight, table[32000].expand(3, -1))
    with pytest.raises(CheckpointError, match="shape"):
        load_released(VocoTokens(3, 12), path)
    save_file({"model.embed_tokens.weight": table[:-1].contiguous()}, str(path))
    with pytest.raises(CheckpointError, match="row 32000"):
        load_released(parts, path)


def test_layouts_are_of_the_released_sizes():
    shapes = layout("quecc").shapes()
    assert shapes["model.mm_projector.0.k_proj.0.weight"] == (1024, 4096)
    assert shapes["model.mm_projector.0.clip_attn.in_proj_weight"] == (3072, 1024)
    assert len(layout("llava_mini").shapes()) == 10 + 4 * 9
    assert all(layout(name).source.startswith("https://") for name in MAKE)
    with pytest.raises(ConfigError, match="also needs"):
        layout("quecc").shapes({"width": 4})
    with pytest.raises(ConfigError, match=r"No released weights.*quecc"):
        layout("pool")


def _spoil(path: Path, made: dict[str, Tensor], how: str) -> Path:
    name = next(iter(made))
    if how == "lacks":
        del made[name]
    elif how == "shape":
        made[name] = made[name][None]
    elif how == "ints":
        made[name] = made[name].long()
    elif how == "nan":
        made[name] = made[name] * torch.nan
    save_file(made, str(path))
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    if how == "pickle":
        return path.rename(path.with_suffix(".bin"))
    return path.parent / "absent" if how == "missing" else path


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("lacks", "lacks model.mm_projector.0"),
        ("shape", "has shape"),
        ("ints", "not floats"),
        ("nan", "NaN or infinity"),
        ("cut", "cannot be read"),
        ("missing", "cannot be read"),
        ("pickle", "pickles are never read"),
    ],
)
def test_files_that_were_not_released(tmp_path: Path, how: str, match: str):
    _, weights, _ = fixture("quecc_a")
    made = checkpoint(layout("quecc"), QUECC["quecc_a"], weights)
    path = _spoil(tmp_path / "model.safetensors", made, how)
    parts = QueryCondenser(32, 2, 48, (4, 4), 8)
    before = copy.deepcopy(parts.state_dict())
    with pytest.raises(CheckpointError, match=match):
        load_released(parts, path)
    assert all(torch.equal(v, before[n]) for n, v in parts.state_dict().items())


def test_an_index_that_is_none(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no index"):
        load_released(QueryCondenser(16, 1, 8, (2, 2), 4), tmp_path)
