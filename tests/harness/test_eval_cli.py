"""`vlmcompress eval run`: options, tables, exit codes, several processes and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.launching import TWO, accelerate
from vlmcompress.cli import app, sweep
from vlmcompress.reference import weights

ARGUMENTS = ("--limit", "12", "--keeps", "0.1", "--batch", "4", "--new-tokens", "4")


@pytest.fixture
def run(reference_folder, monkeypatch):
    monkeypatch.setattr(weights, "WEIGHTS_DIR", reference_folder)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, ["eval", "run", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    return invoke


def _samples(folder):
    files = sorted((folder / "samples").rglob("*.*"))
    return {str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in files}


def test_a_sweep(run, tmp_path):
    options = ["--tasks", "reference", "--methods", "divprune; vtc_cls:0.5 | fastv@2:0.5"]
    told = run("--out", tmp_path, *options, *ARGUMENTS).stdout
    head, _, names, *rows = told.splitlines()
    assert head.startswith("reference: exact_match in %, 12 questions about")
    assert names.split("  ")[0] == "method"
    assert [row.split("  ")[0] for row in rows[:5]] == [
        "all tokens",
        "random",
        "random",
        "divprune",
        "vtc_cls:0.5 | fastv@2:0.5",
    ]
    assert "reference in float32 on" in rows[-1]
    assert "% of the model's time" in rows[-1]
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    again = json.loads(
        run("--out", tmp_path, *options, *ARGUMENTS, "--device", "cpu", "--json").stdout
    )
    assert again["tasks"] == kept["tasks"]
    assert again["time"].get("model") is None  # nothing was asked again


def test_a_yaml_file_and_options_that_win(run, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"tasks: reference\nmethods: divprune\nkeeps: 0.25\nlimit: 40\nbatch: 4\nnew_tokens: 4\n"
        f"out: {tmp_path / 'out'}\n",
        encoding="utf-8",
    )
    results = json.loads(run(file, "--limit", 8, "--seed", 0, "--json").stdout)
    task = results["tasks"]["reference"]
    assert task["questions"] == 8
    assert [row["keep"] for row in task["rows"]] == [None, 0.25, 0.25]
    assert (tmp_path / "out" / "samples" / "reference" / "divprune@0.25.jsonl").exists()


def test_failed_samples_have_an_exit_code(run, tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"not a picture")
    rows = [{"image": f"{n}.png", "question": "what ?", "answer": "x"} for n in ("a", "b", "none")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    out = tmp_path / "out"
    result = run("--out", out, "--tasks", tmp_path, "--methods", "", code=1)
    assert "empty list" in result.output
    result = run("--out", out, "--tasks", tmp_path, "--new-tokens", 2, code=sweep.FAILED)
    assert "2 answers failed" in result.output
    assert "failed" in result.stdout.splitlines()[2]
    (samples,) = (out / "samples").rglob("full.jsonl")
    errors = [json.loads(line)["error"] for line in samples.read_text("utf-8").splitlines()]
    assert errors[0] is None
    assert "image 'b.png' cannot be read" in errors[1]
    assert "image 'none.png' cannot be read" in errors[2]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tasks", "reference"], "give --out FOLDER"),
        (["--out", "{}", "--tasks", "referenc"], "Did you mean 'reference'"),
        (
            ["--out", "{}", "--tasks", "reference", "--methods", "divprun"],
            "Did you mean 'divprune'",
        ),
        (["--out", "{}", "--tasks", "reference", "--metric", "vga"], "Did you mean 'vqa'"),
        (["--out", "{}"], "needs tasks"),
        (["{}/none.yaml", "--out", "{}"], "cannot be read"),
        (["--out", "{}", "--tasks", "reference", "--model", "{}/none"], "cannot be loaded"),
    ],
)
def test_errors_are_one_line(run, tmp_path, arguments, why):
    result = run(*(word.format(tmp_path) for word in arguments), code=1)
    assert why in result.output
    assert "Traceback" not in result.output


def _command(folder, reference_folder, *more):
    return [
        *("-m", "vlmcompress.cli", "eval", "run", "--out", str(folder), "--tasks", "reference"),
        *("--methods", "divprune", *ARGUMENTS, "--device", "cpu"),
        *("--model", str(reference_folder), *more),
    ]


def _environment():
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **threads}


@pytest.mark.slow
def test_two_processes_are_one(run, tmp_path, reference_folder):
    run(*_command(tmp_path / "one", reference_folder)[4:])
    accelerate(*TWO, *_command(tmp_path / "two", reference_folder))
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))
        for name in ("one", "two")
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["tasks"] == one["tasks"]
    assert _samples(tmp_path / "two") == _samples(tmp_path / "one")


def _started(command, folder):
    """A process that has answered its first batch."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not [p for p in folder.glob("samples/*/divprune*.part") if p.stat().st_size]:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def _heed_interrupts():
    """A shell that starts jobs in the background has them and their children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_signals_lose_nothing(tmp_path, reference_folder, run):
    """Killed, then interrupted, then run to its end: as if nothing had happened."""
    long = ("--limit", "120")
    command = _command(tmp_path / "stopped", reference_folder, *long)
    killed = _started(command, tmp_path / "stopped")
    killed.kill()
    killed.communicate()
    before = sum(len(text.splitlines()) for text in _samples(tmp_path / "stopped").values())
    interrupted = subprocess.Popen(
        [sys.executable, *command],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_heed_interrupts,
    )
    time.sleep(0.5)
    deadline = time.monotonic() + 300
    while interrupted.poll() is None and time.monotonic() < deadline:
        now = sum(len(text.splitlines()) for text in _samples(tmp_path / "stopped").values())
        if now > before:
            interrupted.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    told, _ = interrupted.communicate(timeout=300)
    assert interrupted.returncode == 130, told
    assert "Interrupted; " in told
    partial = json.loads((tmp_path / "stopped" / "results.json").read_text(encoding="utf-8"))
    assert not partial["complete"]
    assert 0 < partial["tasks"]["reference"]["rows"][0]["answered"] < 40
    run(*command[4:], "--out", tmp_path / "stopped")
    run(*command[4:], "--out", tmp_path / "whole")
    assert _samples(tmp_path / "stopped") == _samples(tmp_path / "whole")
