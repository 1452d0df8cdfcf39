"""`vlmcompress bench` on the command line: one JSON with everything, and its tables."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vlmcompress.cli import app

TINY = ("--random-weights", "tiny", "--repeats", "1", "--warmup", "0")


def run(*args: str):
    return CliRunner().invoke(app, ["bench", *args])


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    options = ("--methods", "none,uniform,fastv", "--keeps", "0.25", "--new-tokens", "2")
    sweeps = ("--batches", "1,2", "--concurrency", "2", "--requests", "1", "--count", "--memory")
    done = run(*TINY, *options, *sweeps, "--out", str(out))
    assert done.exit_code == 0, done.output
    return done.stdout, json.loads(out.read_text(encoding="utf-8"))


def test_everything_is_in_one_file(everything):
    _, results = everything
    assert [row["method"] for row in results["configs"]] == ["none", "uniform", "fastv"]
    assert len(results["throughput"]["batches"]) == 2 * 4
    assert [row["method"] for row in results["memory"]] == ["none", "uniform", "fastv"]
    assert all(row["flops_counted"]["total"] > 0 for row in results["configs"])
    for field in ("commit", "torch", "transformers", "dtype", "attention", "threads", "cpu"):
        assert results["machine"][field]


def test_every_table_has_both_ratios(everything):
    text, results = everything
    tables = [block.splitlines() for block in text.split("\n\n")]
    headers = [lines[0] for lines in tables if "floor ratio" in lines[0]]
    assert len(headers) == 4  # times, stages, batches, requests at once
    assert all("ideal ratio" in header for header in headers)
    assert "peak resident" in text
    fastv = next(row for row in results["configs"] if row["method"] == "fastv")
    rows = [line.split() for lines in tables for line in lines if " fastv " in f" {line} "]
    told = [f"{fastv['floor_ratio']:.3f}", f"{fastv['ideal_ratio']:.3f}"]
    assert [row[-2:] for row in rows[:5]] == [told] * 5  # two batch sizes


def test_tower_alone():
    done = run(*TINY, "--tower", "--methods", "tome_tower", "--keeps", "0.5", "--batches", "1,2")
    assert done.exit_code == 0, done.output
    assert "ideal ratio" in done.stdout
    found = run(*TINY, "--tower", "--methods", "tome_tower", "--keeps", "0.5", "--json")
    (alone,) = json.loads(found.stdout)["towers"]
    assert alone["configs"][0]["patches"][-1] == 18


def test_a_method_that_reads_the_question_gets_a_text_encoder():
    done = run(*TINY, "--methods", "cdpruner", "--keeps", "0.25", "--new-tokens", "0", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["configs"][0]["tokens"] == 9


def test_a_checkpoint_is_asked_about_a_picture():
    done = run("--methods", "vtc_cls", "--repeats", "1", "--warmup", "0", "--new-tokens", "0",
               "--json")  # fmt: skip
    results = json.loads(done.stdout)
    assert results["machine"]["shape"] == "reference"
    assert results["configs"][0]["ttft_from_image"] is not None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--batches", "0"), "counts of 1 or more"),
        (("--batches", "two"), "counts of 1 or more"),
        (("--random-weights", "huge"), "known shapes"),
        (("--random-weights", "tiny-qwen2.5-vl"), "no [CLS] token"),
    ],
)
def test_wrong_options_are_one_line(options, told):
    done = run(*TINY, *options)
    assert done.exit_code == 1
    assert told in done.output
