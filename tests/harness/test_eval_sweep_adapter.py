"""A trained adapter in a sweep: its settings, LoRA on for them alone, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from eval_harness.shelf import Shelved
from eval_harness.sweep.settings import Setting, settings_of
from tests.harness import sweeps
from tests.hub.adapters import PEFT_WARNING, logits, with_lora
from tests.hub.adapters import model as tiny_model
from tests.seam.equalities import traces
from vlmcompress import hub, patch
from vlmcompress.cli import app
from vlmcompress.core.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)


@pytest.fixture
def tenth(model, tmp_path):
    """LoRA trained for a twentieth to a tenth, on a model that is as before."""
    folder = tmp_path / "tenth"
    with patch(with_lora(model), "vtc_cls", keep=0.1) as handle:
        hub.save(handle, folder, trained_keep=(0.05, 0.1))
    hub.unload(model)
    return folder


@pytest.fixture
def queries(model, tmp_path):
    """A compressor without LoRA."""
    folder = tmp_path / "queries"
    with patch(model, "mqt(max_tokens=16)", keep=8) as handle:
        hub.save(handle, folder, trained_keep=(1, 8))
    return folder


def labels(adapter, keeps):
    return [s.label for s in settings_of([], keeps, adapter=Shelved.of(adapter))]


def test_at_budgets_that_it_was_trained_for(tenth, queries):
    assert labels(tenth, [0.5, 0.1, 0.05]) == [
        "full",
        *("random:0.1", "random:0.05"),
        *("tenth, all tokens", "tenth:0.1", "tenth:0.05"),
    ]
    own = [f"tenth:{keep}" for keep in Shelved.of(tenth).found.keeps]
    assert labels(tenth, [0.5, 8])[-len(own) :] == own
    assert labels(queries, [4, 0.1]) == ["full", "random:4", "queries:4"]


def test_what_answers_depend_on(tenth):
    """Its weights too: other ones are another setting."""
    before = settings_of([], [0.1], adapter=Shelved.of(tenth))[-1]
    weights = tenth / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = settings_of([], [0.1], adapter=Shelved.of(tenth))[-1]
    assert before.digest != after.digest
    assert before != Setting("vtc_cls", 0.1, 0.1)


def test_lora_is_on_for_its_settings_alone(go, model, tenth, tmp_path):
    plan = sweeps.plan(methods=["vtc_cls"], keeps=[0.1], adapter=str(tenth))
    results = go(plan, tmp_path / "both")
    rows = results["tasks"]["reference"]["rows"]
    assert [(row["method"], row["keep"]) for row in rows] == [
        ("full", None),
        ("random", 0.1),
        ("vtc_cls", 0.1),
        ("tenth, all tokens", None),
        ("tenth", 0.1),
    ]
    assert rows[3]["over_full"]["p_holm"] is not None
    assert rows[4]["over_random"] is not None
    assert [row["tokens"]["visual_kept"] for row in rows] == [196, 20, 20, 196, 20]
    assert results["sweep"]["adapter"]["name"] == "tenth"
    assert str(tmp_path) not in json.dumps(results)
    assert not traces(model)
    assert not hub.lora.has_lora(model)

    alone = go(sweeps.plan(methods=["vtc_cls"], keeps=[0.1]), tmp_path / "alone")
    assert alone["complete"]
    for label in ("full", "random@0.1", "vtc_cls@0.1"):
        assert sweeps.rows(tmp_path / "both", label) == sweeps.rows(tmp_path / "alone", label)

    def said(folder, label):
        return [row["prediction"] for row in sweeps.rows(folder, label)]

    hub.load(model, tenth).remove()
    go(sweeps.plan(methods=["vtc_cls"], keeps=[0.1]), tmp_path / "inside")
    hub.unload(model)
    [whole] = [path.stem for path in (tmp_path / "both").rglob("tenth-all*.jsonl")]
    for label, inside in ((whole, "full"), ("tenth@0.1", "vtc_cls@0.1")):
        assert said(tmp_path / "both", label) == said(tmp_path / "inside", inside)
        assert said(tmp_path / "both", label) != said(tmp_path / "both", inside)


def test_trained_weights_are_those_of_the_folder(go, model, queries, tmp_path):
    results = go(sweeps.plan(methods=[], keeps=[4], adapter=str(queries)), tmp_path / "run")
    row = results["tasks"]["reference"]["rows"][-1]
    assert (row["method"], row["tokens"]["visual_kept"]) == ("queries", 4)


def test_an_adapter_of_another_model_asks_nothing(go, model, tmp_path):
    other = tiny_model()
    with patch(with_lora(other), "vtc_cls", keep=0.1) as handle:
        hub.save(handle, tmp_path / "other", trained_keep=(0.1, 0.1))
    plan = sweeps.plan(methods=[], keeps=[0.1], adapter=str(tmp_path / "other"))
    with pytest.raises((CheckpointError, ConfigError)):
        go(plan, tmp_path / "run")
    assert not traces(model)
    assert not hub.lora.has_lora(model)


def test_refusals(tenth, tmp_path):
    with pytest.raises(ConfigError, match="give these"):
        sweeps.plan(adapter=str(tenth), positions="original")
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"vlmcompress_config\.json"):
        sweeps.plan(adapter=str(tmp_path / "none"))


@pytest.mark.slow
def test_the_command(tmp_path, reference):
    model, _ = reference
    with patch(with_lora(model), "vtc_cls", keep=0.1) as handle:
        hub.save(handle, tmp_path / "tenth", trained_keep=(0.1, 0.1))
    asked = ["eval", "run", "--out", tmp_path / "run", "--tasks", "reference", "--limit", 4]
    asked += ["--adapter", tmp_path / "tenth", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, [str(word) for word in asked])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["tasks"]["reference"]["rows"]
    assert [row["method"] for row in rows] == ["full", "random", "tenth, all tokens", "tenth"]


@pytest.fixture
def reference():
    from vlmcompress.reference import load

    return load()


def test_it_computes_what_the_loaded_adapter_does(tmp_path):
    """Switched off, what the model did without."""
    from eval_harness.sweep.adapted import switchable

    base = tiny_model()
    plain = logits(base)
    with patch(with_lora(base), "vtc_cls", keep=0.1) as handle:
        hub.save(handle, tmp_path / "tenth")
    tuned = logits(base)
    hub.unload(base)
    with switchable(base, tmp_path / "tenth") as on:
        assert torch.equal(logits(base), plain)
        with on():
            assert torch.equal(logits(base), tuned)
        assert torch.equal(logits(base), plain)
    assert torch.equal(logits(base), plain)
    assert not torch.equal(tuned, plain)
