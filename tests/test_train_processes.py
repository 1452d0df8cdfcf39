"""`vlmcompress train lora` in two processes: whole copies, and shards (FSDP2), equal to one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.launching import TWO, accelerate
from tests.project import ROOT
from vlmcompress import load_adapter
from vlmcompress.cli import app
from vlmcompress.core.errors import ConfigError
from vlmcompress.hub.folder import PEFT_WEIGHTS, RECIPE, RESULTS
from vlmcompress.reference import load
from vlmcompress.training import loop, sharding
from vlmcompress.training.lora import with_lora
from vlmcompress.training.plan import LoraPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONFIG = ROOT / "examples" / "fsdp2.yaml"
SHARDS = ("--config_file", CONFIG, "-m", "tests.fsdp_worker")
STEPS = 3  # before the third, one side of LoRA has no gradient yet


def command(out: Path, batch: int, *more: str) -> list[str]:
    """Everything but dropout, which draws other numbers in other processes."""
    words = ["train", "lora", "--out", str(out), "--batch", str(batch), "--steps", str(STEPS)]
    words += ["--method", "vtc_cls", "--keep", "0.05:0.5", "--rank", "2", "--accumulate", "2"]
    words += ["--distil", "0.5", "--lr", "1e-3", "--warmup", "1", "--log-every", "1"]
    return [*words, "--save-every", "1", "--questions", "0", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    done = CliRunner().invoke(app, command(folder, 4))
    assert done.exit_code == 0, done.output
    return folder


def assert_same(folder: Path, one: Path) -> None:
    """Weights within 2 % of the way that each went, and the same losses."""
    got, want = load_file(folder / PEFT_WEIGHTS), load_file(one / PEFT_WEIGHTS)
    named = with_lora(load()[0], LoraPlan(rank=2)).named_parameters()
    start = {name.replace(".default", ""): p.detach() for name, p in named if p.requires_grad}
    assert got.keys() == want.keys() == start.keys()
    for name, value in want.items():
        moved = (value - start[name]).norm()
        assert moved > 0
        assert (got[name] - value).norm() <= 0.02 * moved + 1e-6, name
    rows, expected = (
        [json.loads(line) for line in (path / loop.LOG).read_text().splitlines()]
        for path in (folder, one)
    )
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "answers", "distil", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=2e-3), name


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(one: Path, tmp_path: Path) -> None:
    accelerate(*TWO, "-m", "vlmcompress.cli", *command(tmp_path, 2, "--keep-checkpoints"))
    assert json.loads((tmp_path / loop.CHECKPOINTS / "run.json").read_text())["processes"] == 2
    assert_same(tmp_path, one)


@pytest.mark.slow
def test_shards_are_one_process_and_go_on_where_they_stopped(one: Path, tmp_path: Path) -> None:
    measured = ("--keep-checkpoints", "--questions", "4", "--eval-keeps", "0.1")
    accelerate(*SHARDS, *command(tmp_path, 2, *measured))
    assert_same(tmp_path, one)
    worlds = json.loads((tmp_path / RESULTS).read_text())["measured"]["worlds"]
    assert {world["questions"] for world in worlds.values()} == {4}
    with load_adapter(load()[0], tmp_path) as handle:
        assert handle.config.trained_keep == (0.05, 0.5)
    # As if it had been stopped behind the step before the last.
    for name in (RECIPE, PEFT_WEIGHTS):
        (tmp_path / name).unlink()
    newest = tmp_path / loop.CHECKPOINTS / f"checkpoint-{STEPS}"
    assert {"model.safetensors", "optimizer.bin"} <= {path.name for path in newest.iterdir()}
    newest.rename(tmp_path / "taken-away")
    accelerate(*SHARDS, *command(tmp_path, 2))
    assert_same(tmp_path, one)


def asked(**options: Any) -> Any:
    """What `sharding.prepare` looks at."""
    kind = SimpleNamespace(name=options.pop("kind", "FULL_STATE_DICT"))
    plugin = {"fsdp_version": 2, "state_dict_type": kind, "cpu_ram_efficient_loading": False}
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**plugin, **options}))
    model = SimpleNamespace(model=SimpleNamespace(is_quantized=False))
    accelerator = SimpleNamespace(state=state)
    return SimpleNamespace(is_fsdp_enabled=True, accelerator=accelerator, model=model)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"fsdp_version": 1}, "fsdp_version is 1, not 2"),
        ({"kind": "SHARDED_STATE_DICT"}, "is 'SHARDED_STATE_DICT', not 'FULL_STATE_DICT'"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading is True"),
    ],
)
def test_shards_of_other_kinds_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        sharding.prepare(asked(**options))


def test_shards_that_accelerate_would_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SimpleNamespace(is_fsdp_enabled=False)
    assert not sharding.prepare(whole)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="on GPUs and other accelerators only"):
        sharding.prepare(whole)
