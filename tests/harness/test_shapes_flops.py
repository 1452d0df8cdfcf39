"""Shapes are what their names say, and the FLOPs formula agrees with torch's counter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from eval_harness import counted, flops, requests, shapes
from eval_harness.latency import bench
from eval_harness.stages import parts
from vlmcompress.core.errors import ConfigError, UnsupportedModelError

STAGES = ("tower", "connector", "prefill")
TINY = [name for name in shapes.names() if name.startswith("tiny")]
# (image tokens, text width, parameters of the language model in billions, rows of pixel_values)
NAMED = {
    "llava-1.5-1b": (576, 2048, 1.0, (1, 3, 336, 336)),
    "llava-1.5-7b": (576, 4096, 6.6, (1, 3, 336, 336)),
    "llava-next-7b": (5 * 576 + 48, 4096, 6.6, (1, 5, 3, 336, 336)),
    "llava-onevision-7b": (5 * 729 + 54, 3584, 7.1, (1, 5, 3, 384, 384)),
    "qwen2.5-vl-7b": (1024, 3584, 7.1, (4096, 1176)),
}


@pytest.fixture(scope="module")
def model():
    return shapes.build("tiny", attn_implementation="eager")


@pytest.fixture(scope="module", params=TINY)
def uncompressed(request):
    model = shapes.build(request.param)
    rows = bench(
        model, requests.of_shape(model), [("none", None)], repeats=1, warmup=0, new_tokens=0,
        count=True,
    )  # fmt: skip
    return rows["configs"][0]


def test_formula_and_torch_agree_on_every_family(uncompressed):
    formula, torchs = uncompressed["flops"], uncompressed["flops_counted"]
    for stage in (*STAGES, "total"):
        assert formula[stage] == pytest.approx(torchs[stage], rel=0.01)
    assert torchs["selection"] == 0


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("tiny", "uniform"),
        ("tiny", "vtc_cls"),
        ("tiny", "divprune"),
        ("tiny", "tome_tower"),
        ("tiny", "fastv"),
        ("tiny-next", "vtc_cls"),
        ("tiny-onevision", "fastv"),
    ],
)
def test_formula_and_torch_agree_on_what_is_left(name, method):
    model = shapes.build(name)
    (row,) = bench(
        model, requests.of_shape(model), [(method, 0.25)], repeats=1, warmup=0, new_tokens=0,
        count=True,
    )["configs"]  # fmt: skip
    for stage in STAGES:
        assert row["flops"][stage] == pytest.approx(row["flops_counted"][stage], rel=0.01)
        assert row["flops"][stage] <= row["flops_counted"][stage]  # the method's own come on top
    assert row["flops"]["total"] < row["baseline"]["flops"]["total"]


def test_windows_of_a_tower_that_do_not_come_out_even():
    model = shapes.build("tiny-qwen2.5-vl", attn_implementation="eager")
    request = requests.of_shape(model)
    cut = requests.Request(request.processor, request.image.resize((112, 80)), request.prompt)
    inputs, found = cut.inputs(model), parts(model)
    call = lambda: model(**inputs, use_cache=True, logits_to_keep=1)  # noqa: E731
    formula = flops.tower_of_call(model.config, inputs)
    assert formula == pytest.approx(counted.count(call, found, "cpu")["tower"], rel=0.01)


def test_counting_leaves_the_kernels_as_they_were():
    model = shapes.build("tiny")
    with counted.eager_attention(model):
        assert model.config.vision_config._attn_implementation == "eager"
    kernels = [model.config.vision_config, model.config.text_config, model.config]
    assert [config._attn_implementation for config in kernels] == ["sdpa"] * 3


def test_batches_cost_as_much_as_their_rows(model):
    one, three = (requests.of_shape(model).inputs(model, n) for n in (1, 3))
    costs = [
        flops.of_call(model.config, inputs, 36 * rows, 100)
        for rows, inputs in ((1, one), (3, three))
    ]
    assert costs[1].total == 3 * costs[0].total


def test_no_formula_for_experts(model):
    text = SimpleNamespace(model_type="mixture", num_local_experts=8)
    config = SimpleNamespace(get_text_config=lambda: text)
    with pytest.raises(UnsupportedModelError, match="No formula"):
        flops.prefill(config, tower=0, connector_tokens=1, prompt_tokens=1)


def test_total_is_the_sum():
    assert flops.Flops(1, 2, 3).to_dict() == {
        "tower": 1,
        "connector": 2,
        "prefill": 3,
        "total": 6,
    }


@pytest.mark.parametrize("name", NAMED)
def test_sizes_of_the_named_shapes(name):
    tokens, width, billions, pixels = NAMED[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.config(name))
    text = sum(p.numel() for p in model.model.language_model.parameters())
    assert text / 1e9 == pytest.approx(billions, rel=0.06)
    assert model.config.get_text_config().hidden_size == width
    model.name_or_path = name
    on_cpu = SimpleNamespace(device="cpu", dtype=torch.float32)
    inputs = requests.of_shape(model).inputs(on_cpu)
    assert inputs["pixel_values"].shape == pixels
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tokens
    assert inputs["input_ids"].shape[1] == tokens + 64


def test_same_seed_same_weights_and_no_global_rng():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = shapes.build("tiny", torch.bfloat16), shapes.build("tiny", torch.bfloat16)
    assert torch.equal(torch.rand(2), expected)
    assert first.dtype == torch.bfloat16
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_inputs_fit_the_model(model):
    inputs = shapes.example_inputs(model, text_tokens=10)
    assert inputs["input_ids"].shape == (1, 46)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 36
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_unknown_shape():
    with pytest.raises(ConfigError, match="known shapes"):
        shapes.build("huge")
