"""The command line: schemas, pictures, messages and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.hub.adapters import PEFT_WARNING, with_lora
from vlmcompress import demo as demos
from vlmcompress import hub, patch
from vlmcompress.cli import app
from vlmcompress.cli.output import table
from vlmcompress.cli.values import keep_of, words
from vlmcompress.core.errors import ConfigError
from vlmcompress.loading import device_of, dtype_of
from vlmcompress.methods import registry
from vlmcompress.reference import KINDS, load, weights

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "batch",
    "demo",
    "methods",
    "generate",
    "doctor",
    "bench",
    "bench-selection",
    "pareto",
    "report",
    "lmms-path",
)
GROUPS = {
    "calibrate": ("fitprune", "early_exit"),
    "eval": ("methods", "run", "retrieval", "published"),
    "reference": ("train", "eval", "study"),
}


@pytest.fixture
def run(reference_folder, monkeypatch):
    """Run a command in this process and check its exit code, 0 unless told otherwise."""
    monkeypatch.setattr(weights, "WEIGHTS_DIR", reference_folder)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        return result

    return invoke


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((300, 200), 80).convert("RGB").save(path)
    return path


def _check_accuracy(accuracy):
    assert {"1.0", "0.1"} <= set(accuracy)
    for row in accuracy.values():
        assert {"vtc_cls", "fastervlm", "random"} <= set(row)
        for estimate in row.values():
            assert set(estimate) == {"mean", "low", "high"}
            assert 0 <= estimate["low"] <= estimate["mean"] <= estimate["high"] <= 1


def test_help_names_every_command(run):
    text = run("--help").output
    assert all(command in text for command in (*COMMANDS, *GROUPS))


def test_every_command_takes_json(run):
    for command in COMMANDS:
        assert "--json" in run(command, "--help").output
    for group, commands in GROUPS.items():
        for command in commands:
            assert "--json" in run(group, command, "--help").output


def test_version(run):
    import vlmcompress

    assert run("--version").stdout.strip() == vlmcompress.__version__


def test_methods(run):
    rows = json.loads(run("methods", "--json").stdout)["methods"]
    assert [row["name"] for row in rows] == registry.names()
    assert {"stage", "evidence", "text_aware", "count_kind", "paper", "parity"} <= set(rows[0])
    headings = ("method", "evidence", "count kind", "training-free", "parity")
    assert all(heading in run("methods").stdout.splitlines()[0] for heading in headings)
    assert all(name in run("methods").stdout for name in registry.names())


def test_doctor_of_the_reference_model(run):
    found = json.loads(run("doctor", "reference", "--json").stdout)
    assert found["supported"]
    assert found["grid"] == [14, 14]
    assert "14 x 14 = 196" in run("doctor", "reference").stdout


def test_doctor_of_the_environment(run):
    assert "llava" in json.loads(run("doctor", "--json").stdout)["families"]


def test_doctor_of_an_unsupported_model_fails(run):
    result = run("doctor", "internvl", "--json", code=1)
    assert not json.loads(result.stdout)["supported"]
    assert "not supported" in result.stderr


def test_generate_compresses(run, picture, tmp_path):
    overlay = tmp_path / "kept.png"
    asked = ("generate", "--image", picture, "--prompt", "Is there a red circle?")
    options = ("--max-new-tokens", 2, "--device", "cpu", "--overlay", overlay, "--json")
    found = json.loads(run(*asked, "--keep", 0.1, *options).stdout)
    assert (found["tokens_before"], found["tokens_after"]) == ([196], [20])
    assert found["method"] == "vtc_cls:0.1"
    assert isinstance(found["answer"], str)
    assert Image.open(overlay).size == (224, 224)


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_generate_under_an_adapter(run, picture, tmp_path):
    model, _ = load()
    with patch(with_lora(model), "vtc_cls", keep=0.1) as handle:
        hub.save(handle, tmp_path / "tenth", trained_keep=(0.05, 0.1))
    asked = ("generate", "--image", picture, "--prompt", "Is there a red circle?")
    options = ("--max-new-tokens", 2, "--device", "cpu", "--adapter", tmp_path / "tenth")
    found = json.loads(run(*asked, *options, "--json").stdout)
    assert (found["method"], found["tokens_after"]) == ("vtc_cls:0.1", [20])
    assert "trained for" in run(*asked, *options, "--keep", 0.5, code=1).stderr
    run(*asked, *options, "--method", "divprune", code=2)


def test_generate_without_compression(run, picture):
    asked = ("generate", "--image", picture, "--prompt", "Is there a red circle?")
    found = json.loads(run(*asked, "--max-new-tokens", 2, "--device", "cpu", "--json").stdout)
    assert found["keep"] is None


@pytest.fixture(scope="module")
def clip(reference_folder, tmp_path_factory):
    """A folder with a CLIP model of random weights, as wide as the reference model's tower."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    from vlmcompress.reference.model import Shape

    where = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(reference_folder)
    tokenizer.bos_token = tokenizer.eos_token  # every part of a question begins with one
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"hidden_size": 16, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    vision = {"hidden_size": Shape().width, "image_size": 28, "patch_size": 14}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**small, **text, **ids}, vision_config={**small, **vision}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.mark.parametrize("source", ["reference", "folder"])
def test_generate_with_a_method_that_reads_the_question(run, picture, clip, source):
    asked = ("generate", "--image", picture, "--prompt", "Is there a red circle?")
    options = ("--method", "cdpruner", "--keep", 20, "--max-new-tokens", 2, "--device", "cpu")
    where = clip if source == "folder" else source
    found = json.loads(run(*asked, *options, "--clip", where, "--json").stdout)
    assert found["method"] == "cdpruner:20"
    assert found["tokens_after"] == [20]


def test_generate_says_what_a_text_aware_method_lacks(run, picture, reference_folder, tmp_path):
    asked = ("generate", "--image", picture, "--prompt", "Is there a red circle?")
    options = ("--method", "cdpruner", "--keep", 20, "--device", "cpu")
    assert "clip=" in run(*asked, *options, code=1).stderr
    none, other = tmp_path / "none", reference_folder
    assert str(none) in run(*asked, *options, "--clip", none, code=1).stderr
    assert "that of a CLIP model is 'clip'" in run(*asked, *options, "--clip", other, code=1).stderr
    run(*asked, "--keep", 20, "--clip", "reference", code=2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--keep", "1.5"), "1.5"),
        (("--keep", "much"), "much"),
        (("--method", "vtc_clss", "--keep", "0.5"), "vtc_cls"),
        (("--keep", "0.5", "--dtype", "int3"), "bfloat16"),
        (("--keep", "0.5", "--device", "abacus"), "abacus"),
        (("--keep", "0.5", "--model", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_errors_are_one_message(run, picture, options, text):
    result = run("generate", "--image", picture, "--prompt", "a", *options, code=1)
    assert text in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ") or "Error: " in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_missing_weights_are_said(run, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "WEIGHTS_DIR", tmp_path)
    assert "reference train" in run("doctor", "reference", code=1).stderr


def test_wrong_usage_ends_with_two(run, tmp_path):
    run("generate", "--image", tmp_path / "none.png", "--prompt", "a", code=2)
    run("bench", "--model", "reference", "--random-weights", "tiny", code=2)
    run("nothing", code=2)


def test_bench(run, tmp_path):
    out = tmp_path / "deep" / "bench.json"
    options = ("--repeats", 1, "--warmup", 0, "--new-tokens", 2, "--device", "cpu")
    result = run("bench", "--random-weights", "tiny", *options, "--json", "--out", out)
    found = json.loads(result.stdout)
    assert isinstance(found["floor_ratio"], float)
    assert json.loads(out.read_text()) == found


def test_pareto(run, tmp_path):
    out, plot = tmp_path / "pareto.json", tmp_path / "pareto.png"
    options = ("--random-weights", "tiny", "--dtype", "float32", "--rounds", 1, "--questions", 8)
    more = ("--text-questions", 0, "--connectors", "vtc_cls", "--processes", 1)
    text = run(
        "pareto", "--out", out, "--plot", plot, *options, *more, "--towers", "evit:0.4; sta:0.5"
    ).stdout
    results = json.loads(out.read_text())
    specs = [point["spec"] for point in results["points"]]
    assert specs == ["vtc_cls", "evit:0.4 | vtc_cls", "sta:0.5 | vtc_cls"]
    assert all(spec.split(" | ")[0] in text for spec in specs)
    assert results["goal"]["target"][1:] in text
    assert Image.open(plot).width > 900
    wrong = run("pareto", "--out", out, "--keeps", "58", code=1)
    assert "shares in (0, 1)" in wrong.stderr


def test_bench_has_a_floor_ratio_of_any_configuration(run):
    options = ("--repeats", 1, "--warmup", 0, "--new-tokens", 0, "--device", "cpu", "--json")
    chosen = ("--methods", "uniform,random", "--keeps", "5")
    found = json.loads(run("bench", "--random-weights", "tiny", *chosen, *options).stdout)
    assert [row["keep"] for row in found["configs"]] == [5, 5]
    assert found["floor_ratio"] == found["configs"][0]["floor_ratio"]


def test_bench_is_a_table_for_readers(run):
    options = ("--repeats", 1, "--warmup", 0, "--new-tokens", 0, "--device", "cpu")
    text = run("bench", "--random-weights", "tiny", *options).stdout
    assert "unpatched" in text
    assert "floor ratio" in text


def test_bench_refuses_shapes_it_does_not_know(run):
    assert "llava-1.5-1b" in run("bench", "--random-weights", "huge", code=1).stderr


@pytest.mark.slow
def test_reference_eval_keeps_its_schema(run):
    found = json.loads(run("reference", "eval", "--n", 8, "--device", "cpu", "--json").stdout)
    _check_accuracy(found["accuracy"])
    assert {"oracle", "oracle_asked", "anti_oracle"} <= set(found["accuracy"]["0.1"])
    assert found["n"] == 8
    assert set(found["by_kind"]) == set(KINDS)
    assert all(isinstance(value, float) for value in found["by_kind"].values())
    assert isinstance(found["blind"], float)
    assert (type(found["seed"]), type(found["commit"])) == (int, str)


def test_reference_eval_for_readers(run):
    options = ("--methods", "uniform", "--keeps", "0.1,1.0", "--device", "cpu")
    text = run("reference", "eval", "--n", 8, *options).stdout
    assert "without the image" in text
    assert "uniform" in text


@pytest.mark.parametrize("options", [("--split", "exam"), ("--keeps", "auto"), ("--methods", ",")])
def test_reference_eval_refuses(run, options):
    run("reference", "eval", "--n", 8, *options, code=1)


@pytest.mark.slow
def test_reference_train_passes_its_options(run, monkeypatch, tmp_path):
    from vlmcompress.reference import training

    seen = {}
    monkeypatch.setattr(training, "train", lambda out, **options: seen.update(options) or out)
    found = run("reference", "train", "--out", tmp_path, "--steps", 3, "--no-resume", "--json")
    assert json.loads(found.stdout) == {"weights": str(tmp_path)}
    assert (seen["steps"], seen["resume"], seen["processes"]) == (3, False, 2)


@pytest.fixture(scope="module")
def demonstration(reference_folder, tmp_path_factory):
    """Output of a small demonstration, once for all tests."""
    small = demos.Plan(8, (1.0, 0.1), 1)
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(demos, "QUICK", small)
        command = ["demo", "--quick", "--out", str(out), "--weights", str(reference_folder)]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return out, result.stdout


@pytest.mark.slow
def test_demo_writes_its_schema(demonstration):
    out, _ = demonstration
    found = json.loads((out / "results.json").read_text())
    _check_accuracy(found["accuracy"])
    assert set(found["ttft"]) == set(found["accuracy"])
    assert all(isinstance(value, float) for value in found["ttft"].values())
    assert found["ttft_ratio"]["1.0"] == 1
    assert found["ttft_ratio"]["0.1"] > 0
    assert found["machine"]["shape"] == "reference"
    assert found["tokens"] == {"1.0": 196, "0.1": 20}
    assert len(found["questions"]) == 3
    assert len({row["kind"] for row in found["questions"]}) == 3
    assert all(set(row["answers"]) == {"1.0", "0.1"} for row in found["questions"])


@pytest.mark.slow
def test_demo_draws(demonstration):
    out, _ = demonstration
    width, height = Image.open(out / "kept.png").size
    assert (width, height) == (2 * 448 + 16, 448)
    assert Image.open(out / "curve.png").size[0] > 600


@pytest.mark.slow
def test_demo_tells(demonstration):
    _, text = demonstration
    assert "196 -> 20 tokens" in text.splitlines()
    assert text.count("Q: ") == 3
    assert all(method in text for method in demos.METHODS)
    assert "TTFT" in text


def test_demo_shows_five_methods_and_the_oracle():
    methods = set(demos.METHODS)
    assert "oracle" in methods
    assert len(methods - {"oracle"}) >= 5
    assert methods - {"oracle"} <= set(registry.names())
    assert demos.FULL.questions == 240
    assert {1.0, 0.1} <= set(demos.FULL.keeps) & set(demos.QUICK.keeps)


@pytest.mark.parametrize(
    ("text", "keep"), [("0.1", 0.1), ("1", 1), ("1.0", 1.0), ("64", 64), ("auto", "auto")]
)
def test_keep_is_a_fraction_or_a_count(text, keep):
    found = keep_of(text)
    assert found == keep
    assert type(found) is type(keep)


def test_values_that_are_none_raise():
    with pytest.raises(ConfigError, match="fraction"):
        keep_of("a bit")
    with pytest.raises(ConfigError, match="empty"):
        words(" , ")
    with pytest.raises(ConfigError, match="float16"):
        dtype_of("half")
    with pytest.raises(ConfigError, match="abacus"):
        device_of("abacus")


def test_tables_are_aligned():
    lines = table(["name", "n"], [["a", "1"], ["long name", "12"]]).splitlines()
    assert lines == ["name        n", "a           1", "long name  12"]


def _process(*arguments):
    command = [sys.executable, "-m", "vlmcompress.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_process_ends_with_zero_and_clean_json():
    done = _process("methods", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["methods"]


def test_a_process_that_fails_says_why_and_ends_with_one():
    done = _process("bench", "--random-weights", "huge")
    assert done.returncode == 1
    assert "Error: Unknown shape 'huge'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
