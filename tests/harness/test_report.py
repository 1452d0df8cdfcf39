"""The report: what it finds, what stands on its page, and that a browser draws it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from eval_harness.report import figures, inputs, page, pictures, regressions
from eval_harness.report.figures import Timed
from eval_harness.sweep import tables
from eval_harness.sweep.tasks import TaskConfig, open_task
from tests.harness import browser
from vlmcompress.cli import report as command
from vlmcompress.core.errors import ConfigError

TASK, QUESTIONS = "reference", 5
HOSTILE = "<script>alert('no')</script>"
#: {setting: its scores}; the full model answers all but the last question.
SCORES = {
    ("full", None): [1.0, 1.0, 1.0, 1.0, 0.0],
    ("random", 0.25): [0.0, 0.0, 0.0, 0.0, 0.0],
    ("vtc_cls", 0.25): [1.0, 1.0, 0.0, 1.0, 1.0],
    ("vtc_cls", 0.1): [1.0, 0.5, 0.0, 1.0, 1.0],
    ("fastv@1", 0.25): [1.0, 1.0, 0.0, 0.0, 1.0],
}
SECONDS = {("vtc_cls", 0.25): 0.05, ("vtc_cls", 0.1): 0.03, ("fastv@1", 0.25): 0.08}
MACHINE = {
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "abc1234",
    "device": "cpu",
    "cpu": "a processor",
    "dtype": "float32",
    "torch": "2",
    "transformers": "5",
    "shape": "reference",
}


def rows_of(setting):
    method, keep = setting
    for index, score in enumerate(SCORES[setting]):
        yield {
            "index": index,
            "id": str(index),
            "image_id": str(index // 2),
            "method": method,
            "keep": keep,
            "seed": 0,
            "answers": ["red"],
            "prediction": "red" if score == 1 else HOSTILE,
            "score": score,
            "visual_in": 196,
            "visual_kept": 196 if keep is None else round(196 * keep),
            "error": None,
        }


def told_of(setting):
    method, keep = setting
    mean = float(np.mean(SCORES[setting]))
    kept = 196 if keep is None or "fastv" in method else round(196 * keep)
    over = {"mean": mean - 0.8, "low": mean - 0.9, "high": mean - 0.7, "p": 0.5, "p_holm": 1.0}
    return {
        "method": method,
        "keep": keep,
        "runs": 1,
        "failed": 0,
        "score": {"mean": mean, "low": max(0.0, mean - 0.1), "high": min(1.0, mean + 0.1)},
        "over_full": None if method == "full" else over,
        "tokens": {"visual_in": 196.0, "visual_kept": float(kept)},
        "visual_layers": [196.0, 49.0, 49.0, 49.0] if "fastv" in method else [],
    }


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    common = {"model": "reference", "dtype": "float32", "positions": "auto", "clip": None}
    identity = open_task(TaskConfig(TASK, limit=QUESTIONS)).identity
    asked = {"common": common, "tasks": {TASK: identity}, "settings": {}}
    task = {"metric": "exact_match", "questions": QUESTIONS, "images": 3}
    results = {
        "complete": True,
        "machine": MACHINE,
        "tasks": {TASK: {**task, "rows": [told_of(setting) for setting in SCORES]}},
    }
    (folder / "samples" / TASK).mkdir(parents=True)
    for name, value in (("run.json", asked), ("results.json", results)):
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    for method, keep in SCORES:
        file = folder / "samples" / TASK / f"{inputs.label(method, keep).replace(':', '@')}.jsonl"
        lines = (json.dumps(row) + "\n" for row in rows_of((method, keep)))
        file.write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bench_file(tmp_path_factory):
    def times(seconds):
        return {
            "ttft": {"median": seconds, "p90": seconds, "p99": seconds},
            "ttft_from_image": {"median": seconds + 0.01},
            "tpot": None,
            "kv_bytes": 2**20,
        }

    baseline = {**times(0.1), "tokens": 196, "tokens_in_layers": [196] * 4}
    configs = [
        {
            "method": method,
            "keep": keep,
            **times(seconds),
            "tokens": round(196 * keep),
            "tokens_in_layers": [round(196 * keep)] * 4,
            "speedup": 0.1 / seconds,
            "speedup_from_image": 0.11 / (seconds + 0.01),
            "floor_ratio": 1.125,
            "ideal_ratio": 1.25,
            "baseline": baseline,
        }
        for (method, keep), seconds in SECONDS.items()
    ]
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    results = {"machine": MACHINE, "protocol": {"repeats": 3}, "configs": configs}
    file.write_text(json.dumps(results), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def findings(run_folder, bench_file):
    return inputs.read([run_folder, bench_file])


@pytest.fixture(scope="module")
def html_file(run_folder, bench_file, tmp_path_factory):
    """The page as the command writes it, with overlays of the reference model."""
    out = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    command.report([run_folder, bench_file], out=out, samples=2, device="cpu")
    return out


def test_the_worst_regressions_are_what_most_settings_lose(findings):
    (run,) = findings.runs
    found = regressions.worst(run, 10)
    assert [(one.index, one.lost) for one in found] == [(2, 3.0), (3, 1.0), (1, 0.5)]
    labels = [fall.label for fall in found[0].falls]
    assert labels == ["fastv@1:0.25", "vtc_cls:0.1", "vtc_cls:0.25"]  # and `random` is none
    assert [one.index for one in regressions.worst(run, 1)] == [2]
    assert regressions.worst(run, 0) == []


def test_the_front_leaves_out_what_another_beats():
    def point(name, time, mean):
        return Timed(name, name, time, {"mean": mean, "low": mean, "high": mean})

    slow, fast = point("slow", 3.0, 0.9), point("fast", 1.0, 0.5)
    beaten, equal = point("beaten", 2.0, 0.5), point("equal", 3.0, 0.8)
    assert figures.front([slow, beaten, equal, fast]) == [fast, slow]


def test_times_meet_scores_by_method_and_keep(findings):
    (run,), (bench,) = findings.runs, findings.benches
    points = figures.timed(run, TASK, bench)
    assert [point.label for point in points] == ["", "vtc_cls:0.25", "vtc_cls:0.1", "fastv@1:0.25"]
    times = [point.time for point in points]
    assert times == pytest.approx([1, 0.06 / 0.11, 0.04 / 0.11, 0.09 / 0.11])  # from the picture
    assert bench.ttft("divprune", 0.25) is None


def test_a_method_inside_the_language_model_keeps_what_its_layers_keep():
    assert inputs.share_kept(told_of(("fastv@1", 0.25))) == (196 + 3 * 49) / 4 / 196
    assert inputs.share_kept(told_of(("vtc_cls", 0.25))) == 0.25


def test_the_page_needs_nothing_else(html_file):
    text = html_file.read_text(encoding="utf-8")
    kinds = re.findall(r'class="plot" data-kind="(\w+)"', text)
    assert kinds == ["keep", "time", "layers"]
    assert text.count("<svg") == 3
    assert set(re.findall(r'(?:src|href)="([^#"]{5})', text)) <= {"data:"}
    assert "url(http" not in text
    assert "@import" not in text
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    shared = {name for name in identifiers if identifiers.count(name) > 1}
    assert not {name for name in shared if re.search(rf"url\(#{name}\)", text)}


def test_the_page_tells_figures_and_where_they_come_from(html_file):
    text = html_file.read_text(encoding="utf-8")
    assert "<td>1.125</td><td>1.250</td>" in text  # floor and ideal ratio
    assert "80.0 (70.0 to 90.0)" in text
    assert "commit abc1234" in text


def test_answers_are_text_and_no_markup(html_file):
    text = html_file.read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text


def test_kept_patches_are_drawn_on_the_picture(findings):
    (run,) = findings.runs
    (sample,) = pictures.samples(run, regressions.worst(run, 1), device="cpu")
    assert sample.question
    assert {*sample.overlays} == {"fastv@1:0.25", "vtc_cls:0.1", "vtc_cls:0.25"}
    assert all(shown.uri.startswith("data:image/png") for shown in sample.overlays.values())
    assert len({shown.uri for shown in sample.overlays.values()} | {sample.picture.uri}) == 4


def test_what_is_not_at_hand_is_told(findings, tmp_path):
    (run,) = findings.runs
    worst = regressions.worst(run, 1)
    (lost,) = pictures.samples(run, worst, model=str(tmp_path), device="cpu")
    assert all("cannot be loaded" in shown.why for shown in lost.overlays.values())
    renamed = {"mine": {"metric": "exact_match", "split": None, "limit": None, "prompt": None,
                        "new_tokens": 4, "files": {}}}  # fmt: skip
    asked = {**run.asked, "tasks": renamed}
    other = inputs.Run(run.folder, asked, run.results)
    moved = [regressions.Regression("mine", 2, worst[0].full, worst[0].falls, 3.0)]
    (unknown,) = pictures.samples(other, moved)
    assert "--tasks" in unknown.picture.why
    assert unknown.overlays == {}
    assert page.render(findings, {str(run.folder): [unknown]}, "A title").count("--tasks") == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[]", "a list"),
        ('{"towers": []}', "known kind"),
    ],
)
def test_what_is_no_result(tmp_path, text, told):
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        inputs.read([file])


def test_nothing_to_report():
    with pytest.raises(ConfigError, match="needs results"):
        inputs.read([])


@pytest.mark.slow
def test_a_browser_draws_the_plots_and_the_pictures(html_file, tmp_path):
    told = browser.measured(html_file, tmp_path)
    parts = told["boxes"]
    assert [part["kind"] for part in parts if part["kind"] != "picture"] == [
        "keep",
        "time",
        "layers",
    ]
    assert sum(part["kind"] == "picture" for part in parts) == 6  # two samples, four falls
    assert all(part["loaded"] for part in parts)
    shot = np.asarray(Image.open(browser.screenshot(html_file, told["height"], tmp_path)))[..., :3]
    for part in parts:
        left, top, right, bottom = map(round, part["box"])
        drawn = shot[top:bottom, left:right].reshape(-1, 3)
        assert len(drawn) > 10_000
        colours, counts = np.unique(drawn, axis=0, return_counts=True)
        assert len(colours) > 20
        if part["kind"] != "picture":
            # Lines in the colours that matplotlib begins with; one may lie under another.
            apart = colours.astype(int)[:, None] - [(31, 119, 180), (255, 127, 14)]
            near = (np.abs(apart).max(axis=2) <= 6).any(axis=1)
            assert counts[near].sum() > 60


def test_tokdense_is_of_the_tokens_that_layers_see_on_average():
    pruned = told_of(("fastv@1", 0.25))
    assert tables.mean_kept(pruned) == (196 + 3 * 49) / 4
    assert tables.density(pruned) == f"{100 * pruned['score']['mean'] / 85.75:.2f}"
    whole = told_of(("full", None))
    assert tables.density(whole) == f"{100 * whole['score']['mean'] / 196:.2f}"
    assert tables.density({**whole, "score": None}) == "-"
    assert tables.density({**whole, "tokens": {}}) == "-"
    rows = [{**whole, "over_random": None, "rates": {}}]
    task = {"metric": "exact_match", "questions": QUESTIONS, "images": 3, "rows": rows}
    _, header, (cells,) = tables.of_task((TASK, task))
    assert len(cells) == len(header)
    assert cells[header.index("TokDense")] == tables.density(whole)
