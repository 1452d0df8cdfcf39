"""LoRA under compression: what it is put on, losses, resuming, several processes, the folder."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from typer.testing import CliRunner

from tests import tiny
from tests.seam.equalities import traces
from tests.support import same
from vlmcompress import CompressionConfig, load_adapter, patch
from vlmcompress.cli import app
from vlmcompress.core.errors import CheckpointError, ConfigError, VLMCompressError
from vlmcompress.hub.folder import RESULTS
from vlmcompress.reference import load
from vlmcompress.training import loop
from vlmcompress.training.data import Scenes
from vlmcompress.training.distil import IGNORED, AnswerTokens, answer_losses
from vlmcompress.training.keeps import KeepRange
from vlmcompress.training.lora import train, with_lora
from vlmcompress.training.plan import LoraPlan
from vlmcompress.training.targets import lora_targets, outside_decoder
from vlmcompress.training.trainee import Objective, Trainee

# peft asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
#: Four steps with everything that draws numbers: dropout, budgets, two passes per step.
SMALL = LoraPlan(
    method="vtc_cls",
    keep=KeepRange(0.05, 0.5),
    steps=4,
    batch=2,
    accumulate=2,
    rank=2,
    dropout=0.1,
    distil=0.5,
    rate=1e-3,
    warmup=1,
    save_every=1,
    log_every=1,
)


class Killed(Exception):
    """Stands for a signal."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that was not stopped: its folder and what it left."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(*load(), folder, SMALL, Scenes())


def learnt(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def labelled(call: Any) -> dict[str, torch.Tensor]:
    """Labels on text that text predicts.

    Which row is left right in front of what stands behind an image depends on what was kept, and
    padding predicts nothing; answers stand in neither place.
    """
    call = same.labelled(call)
    behind = (call["input_ids"] >= tiny.configs.IMAGE).roll(1, 1)
    first = ~call["attention_mask"].bool().roll(1, 1)
    return {**call, "labels": call["labels"].masked_fill(behind | first, IGNORED)}


def trainee_of(model: Any, objective: Objective, keep: Any = same.KEEP, **plan: Any) -> Any:
    """A tiny model's trainee, patched; adapters start at random where the plan says nothing."""
    tuned = with_lora(model, LoraPlan(rank=2, **plan))
    handle = patch(tuned, keep=keep)
    return Trainee(tuned, handle, objective, train_parts=False), handle


def randomised(trainee: Trainee) -> Trainee:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainee.learning().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainee


# What LoRA is put on


@every_family
@pytest.mark.parametrize("targets", ["all", "attention", "mlp"])
def test_lora_is_on_the_language_model_alone(family: str, targets: str) -> None:
    model = tiny.build(family)
    layers = {id(m) for layer in model.get_decoder().layers for m in layer.modules()}
    tuned = with_lora(model, LoraPlan(rank=2, targets=targets))
    adapted = [m for m in tuned.modules() if hasattr(m, "lora_A")]
    assert adapted
    assert all(id(m.base_layer) in layers for m in adapted)
    names = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    inside = [".self_attn." in name for name in names]
    assert all(inside) if targets == "attention" else not any(inside) or targets == "all"


@every_family
def test_every_adapter_learns_under_compression(family: str) -> None:
    model = tiny.build(family)
    call = labelled(same.mixed(model))
    trainee, _ = trainee_of(model, Objective(0.3, 2.0))
    randomised(trainee)(**call)["loss"].backward()
    routed = ("experts",)  # none of a few tokens may choose one
    for name, parameter in trainee.learning().items():
        assert parameter.grad is not None or any(word in name for word in routed), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("connector", ["lora", "full"])
@same.families("llava", "qwen2_vl", "kimi_k25", "glm4v")
def test_the_connector_learns_if_wanted_and_the_tower_never(family: str, connector: str) -> None:
    model = tiny.build(family)
    call = labelled(same.mixed(model))
    trainee, _ = trainee_of(model, Objective(), connector=connector)
    randomised(trainee)(**call)["loss"].backward()
    kinds = {name: loop.kind_of(name) for name in trainee.learning()}
    outside = {n for n in kinds if ".layers." not in n or "language_model" not in n}
    assert outside
    assert all("merger" in n or "proj" in n for n in outside)
    assert all((kinds[n] == "connector") == (connector == "full") for n in outside)
    assert all(p.grad is not None for n, p in trainee.learning().items() if n in outside)
    with trainee.model.disable_adapter():
        assert all(torch.isfinite(p).all() for p in trainee.model.parameters())


def test_named_targets_and_wrong_ones() -> None:
    model = tiny.build("llava")
    names = [
        n for n, _ in model.named_modules() if re.fullmatch(lora_targets(model, "q_proj,v_proj"), n)
    ]
    assert len(names) == 2 * len(model.get_decoder().layers)
    assert {n.rpartition(".")[2] for n in names} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"q_projj.*self_attn\.q_proj"):
        lora_targets(model, "q_projj")
    with pytest.raises(ConfigError, match="no linear map"):
        lora_targets(tiny.build("ovis2"), connector="lora")


@every_family
def test_what_is_outside_the_language_model(family: str) -> None:
    model = tiny.build(family)
    outside = outside_decoder(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    inside = [n for n in linear if not any(n == o or n.startswith(f"{o}.") for o in outside)]
    decoder = set(model.get_decoder().modules())
    assert "lm_head" in outside
    assert set(inside) == {n for n in linear if model.get_submodule(n) in decoder}


# Losses


@every_family
def test_the_loss_is_that_of_the_model(family: str) -> None:
    """Of its own labels, patched and not; rows of several lengths, images, none."""
    model = tiny.build(family)
    call = labelled(same.mixed(model))
    with torch.no_grad():
        plain = model(**call).loss
        with patch(model, keep=same.KEEP):
            short = model(**call).loss
        trainee, handle = trainee_of(model, Objective())
        torch.testing.assert_close(trainee(**call)["loss"], short, rtol=1e-5, atol=1e-5)
        handle.set(keep=1.0)
        torch.testing.assert_close(trainee(**call)["loss"], plain, rtol=1e-5, atol=1e-5)


@every_family
def test_nothing_is_to_be_learnt_where_nothing_was_changed(family: str) -> None:
    """All kept and an untrained adapter: the teacher is the student, bit for bit."""
    model = tiny.build(family)
    call = labelled(same.mixed(model))
    trainee, handle = trainee_of(model, Objective(distil=1.0, temperature=2.0), keep=1.0)
    trainee.train()
    assert trainee(**call)["loss"].item() == 0
    handle.set(keep=same.KEEP)
    assert trainee(**call)["loss"].item() > 1e-3
    assert all(p.requires_grad for p in trainee.learning().values())
    assert trainee.model.training


def test_losses_are_those_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(150, 11, generator=generator) for _ in range(2))
    student.requires_grad_()
    tokens = torch.randint(11, (150,), generator=generator)
    entropy, distance = answer_losses(student, tokens, teacher, 2.0)
    want = functional.cross_entropy(student, tokens, reduction="sum")
    p, q = ((x / 2).softmax(-1) for x in (teacher, student))
    apart = 4 * (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(entropy, want)
    torch.testing.assert_close(distance, apart)
    (got,) = torch.autograd.grad(entropy + distance, student)
    (expected,) = torch.autograd.grad(want + apart, student)
    torch.testing.assert_close(got, expected)
    assert answer_losses(student, tokens)[1] == 0


def test_only_columns_that_predict_answers_are_computed() -> None:
    labels = torch.full((2, 6), IGNORED)
    labels[0, 4:] = torch.tensor([7, 8])
    labels[1, 5] = 9
    found = AnswerTokens.of(labels)
    assert found.columns.tolist() == [3, 4]
    assert found.tokens.tolist() == [7, 8, 9]
    logits = torch.arange(12.0).reshape(2, 2, 3)
    assert torch.equal(
        found.logits(logits), torch.stack([logits[0, 0], logits[0, 1], logits[1, 1]])
    )


def test_no_float32_copy_of_all_logits_is_held() -> None:
    """What autograd saves of rows in bfloat16 is the rows themselves."""
    student = torch.randn(300, 50).bfloat16().requires_grad_()
    saved: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        answer_losses(student, torch.zeros(300, dtype=torch.int64), student.detach(), 2.0)
    assert not [x.shape for x in saved if x.dtype == torch.float32 and x.ndim == 2]


@same.THREE
def test_recomputed_layers_give_the_same(family: str) -> None:
    call = labelled(same.mixed(tiny.build(family)))

    def seen(wanted: bool) -> Any:
        from vlmcompress.training.lora import _recomputing

        model = tiny.build(family)
        trainee, _ = trainee_of(model, Objective(0.5))
        randomised(trainee).train()
        calls = []
        inner = model.get_decoder().layers[0].mlp
        inner.register_forward_pre_hook(lambda *_: calls.append(1))
        with _recomputing(model, wanted):
            loss = trainee(**call)["loss"]
            loss.backward()
        return loss.detach(), [p.grad for p in trainee.learning().values()], len(calls)

    (plain, want, once), (loss, got, twice) = seen(False), seen(True)
    torch.testing.assert_close(loss, plain)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert twice == once + 1


@pytest.mark.slow
def test_equal_images_go_through_the_tower_once() -> None:
    """With the loss of the rows one by one."""
    model, processor = load()
    from vlmcompress.training.conversations import Collator

    stream = Scenes().stream(1, 6, 0)
    batch = Collator(processor)([stream[i] for i in range(6)])
    assert len(batch["shown"].unique()) < 6
    trainee, _ = trainee_of(model, Objective(0.5), keep=0.1)
    randomised(trainee)
    images: list[int] = []
    tower = model.model.vision_tower
    hook = tower.register_forward_hook(lambda _, __, out: images.append(len(out[0])))
    with torch.no_grad():
        once = trainee(**batch)["loss"]
        hook.remove()
        apart = trainee(**{k: v for k, v in batch.items() if k != "shown"})["loss"]
    assert images == [len(batch["shown"].unique())] * 2
    torch.testing.assert_close(once, apart, rtol=1e-4, atol=1e-5)


# Budgets


def test_budgets_are_drawn_by_step() -> None:
    drawn = KeepRange.parse("0.02:0.5")
    first = [drawn.at(step, 0) for step in range(400)]
    assert first == [drawn.at(step, 0) for step in range(400)]
    assert first != [drawn.at(step, 1) for step in range(400)]
    assert min(first) >= 0.02
    assert max(first) <= 0.5
    assert 0.4 < sum(keep < 0.1 for keep in first) / 400 < 0.6
    even = [KeepRange.parse("0.02:0.5", "uniform").at(step, 0) for step in range(400)]
    assert 0.4 < sum(keep < 0.26 for keep in even) / 400 < 0.6
    counts = {KeepRange.parse("1:4").at(step, 0) for step in range(200)}
    assert counts == {1, 2, 3, 4}
    assert KeepRange.parse("8").at(3, 0) == 8
    assert KeepRange.parse("0.02:0.5").middle == 0.1
    assert KeepRange.parse("4:64", "uniform").middle == 34


@pytest.mark.parametrize(
    "text", ["", "x", "0.1:", "0.5:0.1", "1:0.5", "0", "2.0", "0.1:0.2:0.3", "auto"]
)
def test_budgets_that_make_no_sense(text: str) -> None:
    with pytest.raises(VLMCompressError, match="keep is"):
        KeepRange.parse(text)


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 3])
def test_a_resumed_run_ends_where_a_whole_one_does(
    whole: Any, tmp_path: Path, stopped: int
) -> None:
    def stop(found: dict[str, float]) -> None:
        seen.append(found)
        if found["step"] == stopped:
            raise Killed

    seen: list[dict[str, float]] = []
    model, processor = load()
    with pytest.raises(Killed):
        train(model, processor, tmp_path, SMALL, Scenes(), progress=stop)
    assert traces(model) == []
    torch.manual_seed(99)
    done = train(*load(), tmp_path, SMALL, Scenes(), progress=seen.append)
    # The step that was stopped at was not saved any more.
    assert [row["step"] for row in seen] == [*range(1, stopped + 1), *range(max(1, stopped), 5)]
    assert [row["keep"] for row in seen[:-1]][: stopped - 1] == [
        SMALL.keep.at(step, 0) for step in range(stopped - 1)
    ]
    folder, want = whole
    got, expected = learnt(done.model), learnt(want.model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert done.curve == want.curve
    assert (tmp_path / loop.LOG).read_text() == (folder / loop.LOG).read_text()


@pytest.mark.slow
def test_what_a_run_leaves(whole: Any) -> None:
    folder, done = whole
    rows = [json.loads(line) for line in (folder / loop.LOG).read_text().splitlines()]
    assert rows == done.curve
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["answers"] > 0 and row["distil"] > 0 and 0 <= row["right"] <= 1 for row in rows)
    assert all(p.abs().sum() > 0 for n, p in learnt(done.model).items() if "lora_B" in n)
    assert traces(done.model.get_base_model()) == []
    assert not done.model.training
    assert done.main


@pytest.mark.slow
def test_runs_that_do_not_go_together(whole: Any, tmp_path: Path) -> None:
    import shutil

    model, processor = load()
    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    with pytest.raises(ConfigError, match=r"trained with rank=2: resume with the same"):
        train(model, processor, copy, dataclasses.replace(SMALL, rank=4), Scenes())
    newest = copy / loop.CHECKPOINTS / "checkpoint-4"
    (newest / "trainer_state.json").write_text("{")
    (newest.parent / "checkpoint-3" / "optimizer.pt").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is no whole part"):
        train(model, processor, copy, SMALL, Scenes())
    assert not newest.exists()
    (copy / loop.CHECKPOINTS / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not say what the run was"):
        train(model, processor, copy, SMALL, Scenes())
    assert traces(model) == []


@pytest.mark.slow
def test_a_few_steps_lower_the_loss(tmp_path: Path) -> None:
    """Of the same questions again and again, from a model that never saw so few tokens."""
    stream = Scenes().stream(1, 8, 0)

    class Same:
        def stream(self, steps: int, size: int, seed: int) -> Sequence[Any]:
            return [stream[i % 8] for i in range(steps * size)]

    plan = LoraPlan(
        "random", KeepRange(4, 4), steps=12, batch=8, rank=4, rate=5e-3, warmup=1, log_every=1
    )
    done = train(*load(), tmp_path, dataclasses.replace(plan, save_every=12), Same())
    losses = [row["answers"] for row in done.curve]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.slow
def test_low_precision_has_nearly_the_same_loss(whole: Any, tmp_path: Path) -> None:
    plan = dataclasses.replace(SMALL, precision="bfloat16", steps=1, dropout=0.0)
    done = train(*load(dtype=torch.bfloat16), tmp_path, plan, Scenes())
    assert {p.dtype for p in learnt(done.model).values()} == {torch.float32}
    assert done.curve[0]["answers"] == pytest.approx(
        whole[1].curve[0]["answers"], abs=0.02
    )  # a few units in the last place of a logit


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"rank": 0}, "rank"),
        ({"rate": -1.0}, "rate"),
        ({"dropout": 1.5}, "dropout"),
        ({"distil": 2.0}, "distil"),
        ({"temperature": 0.0}, "temperature"),
        ({"precision": "int8"}, "float32"),
        ({"connector": "half"}, "'lora', 'full'"),
        ({"save_every": 15}, "a multiple"),
    ],
)
def test_plans_that_make_no_sense(options: dict[str, Any], match: str) -> None:
    with pytest.raises(VLMCompressError, match=match):
        LoraPlan(**options)


@pytest.mark.slow
def test_parts_that_are_not_there(tmp_path: Path) -> None:
    model, processor = load()
    plan = dataclasses.replace(SMALL, train_parts=True)
    with pytest.raises(ConfigError, match="learns nothing"):
        train(model, processor, tmp_path, plan, Scenes())
    atp = dataclasses.replace(SMALL, method="atp", keep=None, train_parts=True, distil=0.0)
    with pytest.raises(ConfigError, match="give a target"):
        train(*load(), tmp_path / "atp", atp, Scenes())
    assert traces(model) == []


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method",
    ["mqt(max_tokens=9)", "tokenpacker", "quecc", "llava_mini(fusion=1)", "voco_llama", "mod"],
)
def test_methods_learn_along(method: str, stored: str, tmp_path: Path) -> None:
    plan = dataclasses.replace(
        SMALL, method=method, keep=KeepRange(4, 4), train_parts=True, stored=stored, steps=2
    )
    model, processor = load()
    trained = train(model, processor, tmp_path, plan, Scenes())
    untrained = patch(model, method, keep=4, processor=processor, seed=plan.seed)
    first = untrained.parts.state_dict()
    assert any(not torch.equal(first[n], v) for n, v in _only(trained.parts).state_dict().items())
    untrained.remove()

    other, processor = load()
    handle = load_adapter(other, tmp_path, processor=processor)
    assert handle.parts is not None
    for name, value in _only(trained.parts).state_dict().items():
        assert torch.equal(handle.parts.state_dict()[name], value), name
    tuned = {n: p for n, p in trained.model.state_dict().items() if "lora_" in n}
    found = {n.replace("base_model.model.", ""): p for n, p in other.state_dict().items()}
    for name, value in tuned.items():
        assert torch.equal(found[name.replace("base_model.model.", "")], value), name
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert dtypes == {getattr(torch, stored)}


def _only(parts: dict[str, Any]) -> Any:
    [one] = parts.values()
    return one


def test_thresholds_learn_along(tmp_path: Path) -> None:
    plan = dataclasses.replace(
        SMALL, method="atp", keep=None, train_parts=True, target=0.4, distil=0.0, steps=2
    )
    done = train(*load(), tmp_path, plan, Scenes())
    from vlmcompress.methods.decoder.atp import ATP
    from vlmcompress.methods.decoder.base import DecoderShape

    text = done.model.get_base_model().config.text_config
    fresh = ATP().parts(DecoderShape(text.num_hidden_layers, text.hidden_size))
    pairs = zip(done.parts["atp"].state_dict().values(), fresh.state_dict().values(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)


# 4 bits


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_five_steps_in_four_bits(tmp_path: Path) -> None:
    """Tower and connector stay as they are, the adapter learns."""
    pytest.importorskip("bitsandbytes")
    from tests.support.test_quantised import wide
    from vlmcompress.training.loading import load_in_4bit

    wide("llava").save_pretrained(tmp_path)
    model = load_in_4bit(str(tmp_path), "float32", torch.device("cpu"))
    quantised = {n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert quantised
    assert all(n.startswith("model.language_model.layers.") for n in quantised)
    trainee, _ = trainee_of(model, Objective(0.5))
    trainee.train()
    call = labelled(same.mixed(model))
    optimizer = torch.optim.AdamW(trainee.learning().values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = trainee(**call)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


# The command


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "lora-tiny"
    words = ["train", "lora", "--out", str(out), "--method", "vtc_cls", "--keep", "0.05:0.2"]
    words += ["--steps", "2", "--batch", "2", "--rank", "2", "--log-every", "1", "--questions", "8"]
    words += ["--save-every", "2", "--eval-keeps", "0.1", "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    results = json.loads((out / RESULTS).read_text())
    assert json.loads(done.stdout) == results
    measured = results["measured"]["worlds"]["text"]
    assert measured["questions"] == 8
    row = measured["at"]["0.1"]
    assert row["gain"]["mean"] == pytest.approx(row["after"]["mean"] - row["before"]["mean"])
    assert row["recovered"] == pytest.approx(row["after"]["mean"] / measured["full"]["mean"])
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "log.jsonl"),
        *("recipe.yaml", "results.json", "vlmcompress_config.json"),
    }
    assert "--steps 2 --batch 2" in results["command"]
    assert not [p for p in out.glob("*.[jym]*") if str(tmp_path) in p.read_text()]
    assert CompressionConfig.load(out).trained_keep == (0.05, 0.2)
    with load_adapter(load()[0], out) as handle:
        assert handle.config.to_spec() == "vtc_cls:0.1"
        with pytest.raises(ConfigError, match=r"trained for keep from 0\.05 to 0\.2"):
            handle.set(keep=0.5)
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "finished adapter" in again.output
