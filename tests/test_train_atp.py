"""Training ATP: batches, resuming, LoRA, the folder that is left, and what refuses it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.seam.equalities import traces
from vlmcompress import CompressionConfig, load_adapter, patch
from vlmcompress.cli import app
from vlmcompress.core.errors import CheckpointError, ConfigError, MissingExtraError
from vlmcompress.hub.folder import CARD, RESULTS
from vlmcompress.hub.results import evaluations
from vlmcompress.methods.decoder.atp import ATP
from vlmcompress.reference import KINDS, TEXT_KINDS, load
from vlmcompress.training import adapter, atp
from vlmcompress.training.atp import CHECKPOINT, LOG, Plan, train
from vlmcompress.training.questions import batch_of, encoded, encoded_once, right_share
from vlmcompress.training.recipe import recipe_of

TINY = Plan(steps=2, batch=2)


@pytest.fixture(scope="module")
def reference() -> Any:
    return load()


@pytest.fixture(scope="module")
def run(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    return folder, train(*reference, folder, TINY)


def numbers(parts: Any) -> list[torch.Tensor]:
    return [value.clone() for value in parts.state_dict().values()]


def test_batches_depend_on_step_and_seed_alone() -> None:
    first, again, later, other = (
        batch_of(*of) for of in ((0, 4, 0), (0, 4, 0), (1, 4, 0), (0, 4, 1))
    )
    said = [[(s.scene_id, s.question) for s in asked] for asked in (first, again, later, other)]
    assert said[0] == said[1]
    assert not {scene for scene, _ in said[0]} & {scene for scene, _ in said[2] + said[3]}
    assert {s.kind for s in batch_of(3, 3, 0)} <= set(TEXT_KINDS)
    assert {s.kind for s in first} <= set(KINDS)


def test_labels_are_the_answers_and_their_ends(reference: Any) -> None:
    model, processor = reference
    asked = batch_of(0, 5, 0)
    inputs = encoded(processor, asked)
    tokenizer = processor.tokenizer
    for labels, sample in zip(inputs["labels"], asked, strict=True):
        text = tokenizer.decode(labels[labels >= 0])
        assert text == f" {sample.answer}{tokenizer.eos_token}"
    with torch.no_grad(), patch(model, ATP()) as handle:
        plain = model(**inputs).logits
        once = model(**encoded_once(handle, inputs, asked)).logits
    torch.testing.assert_close(once, plain, rtol=1e-4, atol=1e-4)
    assert 0 <= right_share(plain, inputs["labels"]) <= 1


def test_answers_are_right_when_every_token_is() -> None:
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 1]])
    logits = torch.zeros(2, 3, 4)
    logits[:, 0, 1] = logits[:, 1, 1] = 1
    assert right_share(logits, labels) == 0.5
    logits[0, 1, 2] = 2
    assert right_share(logits, labels) == 1.0


@pytest.mark.slow
def test_a_resumed_run_ends_where_a_whole_one_does(
    reference: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def stop(found: dict[str, float]) -> None:
        raise Killed

    monkeypatch.setattr(atp, "_SAVE_EVERY", 1)
    with pytest.raises(Killed):
        train(*reference, tmp_path, TINY, progress=stop)
    assert traces(reference[0]) == []
    steps: list[float] = []
    resumed = train(*reference, tmp_path, TINY, progress=lambda found: steps.append(found["step"]))
    assert steps == [2]
    whole = run[1]
    for a, b in zip(numbers(resumed.parts), numbers(whole.parts), strict=True):
        assert torch.equal(a, b)
    assert resumed.curve == whole.curve
    with pytest.raises(ConfigError, match=r"trained with target=0\.25: resume with the same"):
        train(*reference, tmp_path, dataclasses.replace(TINY, target=0.4))
    (tmp_path / CHECKPOINT).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        train(*reference, tmp_path, TINY)


@pytest.mark.slow
def test_steps_move_the_heads_and_nothing_else(reference: Any, run: Any) -> None:
    folder, trained = run
    model = reference[0]
    fresh = ATP().parts(atp_shape(model))
    pairs = zip(numbers(fresh), numbers(trained.parts), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)
    assert not trained.parts.training
    assert traces(model) == []
    assert all(p.grad is None for p in model.parameters())
    (row,) = (json.loads(line) for line in (folder / LOG).read_text().splitlines())
    assert row["step"] == 2
    assert 0 < row["average_keep"] <= 1
    assert trained.curve == [{k: v for k, v in row.items() if k != "seconds"}]


def atp_shape(model: Any) -> Any:
    from vlmcompress.methods.decoder.base import DecoderShape

    text = model.config.text_config
    return DecoderShape(text.num_hidden_layers, text.hidden_size)


@pytest.mark.slow
def test_an_adapter_loads_with_one_line(reference: Any, run: Any, tmp_path: Path) -> None:
    model, processor = reference
    _, trained = run
    call = encoded(processor, batch_of(0, 2, 0))
    with patch(model, trained.method) as handle, torch.no_grad():
        handle.parts.load_state_dict(trained.parts.state_dict())
        want = model(**call).logits
    adapter.save(model, trained, tmp_path)
    path = tmp_path / "atp.safetensors"
    with load_adapter(model, tmp_path) as handle, torch.no_grad():
        assert torch.equal(model(**call).logits, want)
        assert handle.config.to_spec().startswith("atp(")
    assert CompressionConfig.load(tmp_path).stages[0].options["weights"] == path.name
    for text in (
        (tmp_path / "vlmcompress_config.json").read_text(),
        path.read_bytes().decode("latin"),
    ):
        assert str(tmp_path) not in text


def test_what_is_no_adapter(reference: Any, tmp_path: Path) -> None:
    model = reference[0]
    with pytest.raises(ConfigError, match="is no adapter"):
        load_adapter(model, tmp_path)
    config = {"version": 1, "stages": [{"method": "atp", "options": {"weights": "../x"}}]}
    (tmp_path / "vlmcompress_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="beside its"):
        load_adapter(model, tmp_path)
    config["stages"][0]["options"]["weights"] = "x"
    (tmp_path / "vlmcompress_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no usable weights"):
        load_adapter(model, tmp_path)
    assert traces(model) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_learns_and_loads(tmp_path: Path) -> None:
    model, processor = load()
    call = encoded(processor, batch_of(0, 2, 0))
    trained = train(model, processor, tmp_path / "run", dataclasses.replace(TINY, lora=2))
    lora = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert all(p.abs().sum() > 0 for p in lora)
    with patch(model, trained.method) as handle, torch.no_grad():
        handle.parts.load_state_dict(trained.parts.state_dict())
        want = model(**call).logits
    adapter.save(model, trained, tmp_path / "adapter")
    other, _ = load()
    with load_adapter(other, tmp_path / "adapter"), torch.no_grad():
        torch.testing.assert_close(other(**call).logits, want, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not config["base_model_name_or_path"]


def test_lora_needs_peft(reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise MissingExtraError(module, "train")

    monkeypatch.setattr(atp, "require", missing)
    with pytest.raises(MissingExtraError, match=r"vlmcompress\[train\]"):
        train(*reference, tmp_path, dataclasses.replace(TINY, lora=2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"target": 1.5}, r"lie in \[0, 1\]"),
        ({"rate": -1.0}, "rate"),
        ({"lora": -1}, "lora"),
        ({"precision": "int8"}, "float32, bfloat16"),
    ],
)
def test_plans_that_make_no_sense(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Plan(**options)


@pytest.mark.slow
def test_a_target_that_no_thresholds_meet(reference: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"between 0\.125 and 1"):
        train(*reference, tmp_path, Plan(steps=1, batch=1, target=0.1))
    assert traces(reference[0]) == []


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "atp-tiny"
    words = ["train", "atp", "--out", str(out), "--steps", "2", "--batch", "2"]
    words += ["--precision", "bfloat16", "--questions", "8", "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    results = json.loads((out / RESULTS).read_text())
    assert json.loads(done.stdout) == results
    measured = results["measured"]
    assert set(measured["difference"]) == {"fastv", "pyramiddrop", "random_layer", "uniform_layer"}
    for name, share in measured["flops"].items():
        assert share == pytest.approx(measured["flops"]["atp"], rel=0.02), name
    assert measured["left"][0] == measured["tokens"] == 196
    assert measured["average_keep"] == pytest.approx(sum(measured["left"]) / 8 / 196)
    text = (out / CARD).read_text()
    assert recipe_of(out)["command"] == results["command"]
    assert "--steps 2 --batch 2 --precision bfloat16 --questions 8" in text
    rows = {(e.setting, e.metric): e for e in evaluations(results)}
    assert len(rows) == len(results["evaluations"])
    fastv = rows["fastv, as much on average", "accuracy"]
    assert fastv.value == measured["accuracy"]["fastv"]["mean"]
    assert (
        rows["atp minus fastv", "accuracy, paired difference"].value
        == (measured["difference"]["fastv"]["mean"])
    )
    assert f"| fastv, as much on average | accuracy | {fastv.shown} | 8 |" in text
    assert str(tmp_path) not in text
    with load_adapter(load()[0], out) as handle:
        assert handle.parts is not None
