"""FitPrune's schedule: fitted to statistics, statistics of real layers, and the command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests import tiny
from tests.tiny import Prompt
from vlmcompress import calibrate, handle_of, patch
from vlmcompress.cli import app
from vlmcompress.core.costs import layered_flops
from vlmcompress.core.errors import ConfigError, UnsupportedModelError, VLMCompressError
from vlmcompress.methods.decoder.fitting import Sample, fit, shares_left, tolerances
from vlmcompress.methods.decoder.statistics import AttentionStatistics
from vlmcompress.reference import weights

LAYERS = 4


def random_samples(seed: int, sizes: tuple[int, ...] = (9, 14, 6)) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Sample(*torch.rand(2, LAYERS, n, generator=generator).pow(3), text=3 + i)
        for i, n in enumerate(sizes)
    ]


def rows(lengths: Any) -> float:
    """A cost that grows with both halves, one of them quadratically."""
    return float(sum(a * a + 5 * m for a, m in lengths))


def dropped(received: np.ndarray, tolerance: float) -> set[int]:
    """The largest set of least attended tokens below a share of the sum."""
    order = sorted(range(len(received)), key=lambda j: (received[j], -j))
    gone: set[int] = set()
    for j in order:
        if received[[*gone, j]].sum() / received.sum() >= tolerance:
            break
        gone.add(j)
    return gone


def plain_left(samples: list[Sample], tolerance: float) -> list[float]:
    each = []
    for sample in samples:
        gone: set[int] = set()
        own, cross = sample.own.double().numpy(), sample.cross.double().numpy()
        for layer in range(LAYERS):
            gone |= dropped(own[layer], tolerance) & dropped(cross[layer], tolerance)
            each.append(max(1, len(own[layer]) - len(gone)) / len(own[layer]))
    return np.array(each).reshape(len(samples), LAYERS).mean(0).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_what_a_tolerance_drops(seed: int):
    samples = random_samples(seed)
    limits = [tolerances(sample) for sample in samples]
    for tolerance in (0.0, 1e-3, 0.05, 0.2, 0.5, 0.9, 1.0, 1.5):
        want = plain_left(samples, tolerance)
        np.testing.assert_allclose(shares_left(limits, tolerance), want)


def plain_cost(samples: list[Sample], left: list[float]) -> float:
    total = 0.0
    for sample in samples:
        n = sample.own.shape[1]
        behind = [sample.text + max(1, int(n * share + 0.5)) for share in left]
        total += rows(zip([sample.text + n, *behind[:-1]], behind, strict=True))
    return total / len(samples)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [0.45, 0.6, 0.8, 0.95])
def test_the_smallest_tolerance_within_the_budget(seed: int, budget: float):
    samples = random_samples(seed)
    found = fit(samples, rows, budget)
    full = plain_cost(samples, [1.0] * LAYERS)
    assert found.cost == pytest.approx(plain_cost(samples, list(found.left)) / full)
    assert found.cost <= budget
    assert all(late <= early for early, late in itertools.pairwise((1.0, *found.left)))
    # A little less tolerance, and the budget would be exceeded.
    smaller = plain_left(samples, found.tolerance * (1 - 1e-9))
    steps = sorted({t for s in samples for t in tolerances(s).flatten().tolist()})
    below = max((t for t in steps if t < found.tolerance), default=0.0)
    assert smaller == pytest.approx(list(found.left))
    assert plain_cost(samples, plain_left(samples, below)) / full > budget


def test_a_whole_budget_drops_nothing():
    found = fit(random_samples(0), rows, 1.0)
    assert found.left == (1.0,) * LAYERS
    assert found.cost == 1.0


def test_what_cannot_be_fitted():
    with pytest.raises(ConfigError, match="0 samples"):
        fit([], rows, 0.5)
    with pytest.raises(ConfigError, match=r"cannot bring the prefill down to 0\.01"):
        fit(random_samples(0), rows, 0.01)
    with pytest.raises(ConfigError, match=r"budget is 1\.5"):
        fit(random_samples(0), rows, 1.5)


def test_without_text_behind_the_image_its_own_rows_decide():
    (sample,) = random_samples(1, (8,))
    silent = Sample(sample.own, torch.zeros_like(sample.cross), 2)
    both = Sample(sample.own, sample.own, 2)
    assert torch.equal(tolerances(silent), tolerances(both))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_statistics_are_those_of_the_attention_maps(family: str):
    model = tiny.build(family)
    call = tiny.inputs(model, (Prompt(images=2, text=7), Prompt(images=1, text=5)))
    recorder = AttentionStatistics()
    logits = model(**call).logits
    with patch(model, recorder):
        assert torch.equal(model(**call).logits, logits)
        samples = recorder.take()
        assert recorder.take() == []
    model.set_attn_implementation("eager")
    maps = model(**call, output_attentions=True).attentions
    visual = call["input_ids"] == model.config.image_token_id
    for b, sample in enumerate(samples):
        columns = visual[b].nonzero()[:, 0]
        behind = torch.arange(visual.shape[1]) > columns[-1]
        text = behind & call["attention_mask"][b].bool()
        assert sample.text == int(call["attention_mask"][b].sum()) - len(columns)
        for layer, attention in enumerate(maps):
            strongest = attention[b].amax(0)
            own, cross = strongest[columns].sum(0), strongest[text].sum(0)
            torch.testing.assert_close(sample.own[layer], own[columns], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(sample.cross[layer], cross[columns], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_command_writes_what_the_method_reads(reference_folder: Path, tmp_path: Path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.effect_noise((64, 48), 60 + i).convert("RGB").save(pictures / f"{i}.png")
    lines = [{"image": f"pictures/{i}.png", "question": f"How many? {i}"} for i in range(3)]
    data, out = tmp_path / "data.jsonl", tmp_path / "out" / "schedule.json"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    command = ["calibrate", "fitprune", str(reference_folder), "--flops", "0.6", "--samples", "2"]
    result = CliRunner().invoke(app, [*command, "--data", str(data), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["samples"] == 2
    assert 0.55 < written["flops"] <= 0.6
    shipped = reference_folder == weights.WEIGHTS_DIR
    model, processor = weights.load() if shipped else loaded(reference_folder)
    image, question = Image.open(pictures / "0.png"), "How many? 0"
    inputs = processor(
        text=[calibrate.prompt_of(processor, question)], images=[image], return_tensors="pt"
    )
    with patch(model, f"fitprune(schedule={str(out)!r})") as handle:
        model(**inputs)
        record = handle.last
    assert record is not None
    config = model.get_decoder().config
    length = inputs["input_ids"].shape[1]
    full = layered_flops(config, [(length, length)] * len(record.layer_lengths), logits=0)
    found = layered_flops(config, record.layer_lengths, logits=0)
    assert found is not None
    assert full is not None
    assert found / full == pytest.approx(written["flops"], abs=0.01)
    n = record.tokens_before[0]
    behind = [mlp - (length - n) for _, mlp in record.layer_lengths]
    assert behind == [max(1, int(n * share + 0.5)) for share in written["left"]]


def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


def test_drawn_scenes_are_the_default(reference_folder: Path, tmp_path: Path):
    out = tmp_path / "schedule.json"
    command = ["calibrate", "fitprune", str(reference_folder), "--samples", "1", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"written to {out}" in result.output
    assert json.loads(out.read_text())["data"] == "reference scenes"


@pytest.mark.parametrize("line", ["nothing", '{"image": "a.png"}', "[]"])
def test_lines_that_are_no_questions(reference_folder: Path, tmp_path: Path, line: str):
    data = tmp_path / "data.jsonl"
    data.write_text(line)
    command = ["calibrate", "fitprune", str(reference_folder), "--data", str(data)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "Line 1 of" in result.output


def test_a_model_is_as_before_when_calibration_fails(reference_folder: Path):
    model, processor = loaded(reference_folder)
    with pytest.raises(ConfigError, match="0 samples"):
        calibrate.fitprune(model, processor, [], 0.5)
    with pytest.raises(VLMCompressError, match="is not patched"):
        handle_of(model)


def test_costs_that_are_not_known(reference_folder: Path):
    model, _ = loaded(reference_folder)
    model.get_decoder().config.num_experts = 8
    with pytest.raises(UnsupportedModelError, match="FLOPs of a"):
        calibrate.cost_of(model)([(3, 3)])
