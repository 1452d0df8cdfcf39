"""What a sweep says of known answers, and the memory that it needs for many."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from PIL import Image

from eval_harness.pairs import holm
from eval_harness.sweep import run, store
from eval_harness.sweep.asker import Answer, Batch, Spent
from eval_harness.sweep.processes import Processes
from eval_harness.sweep.tasks import open_task
from eval_harness.sweep.worker import Worker
from tests.harness import sweeps


def _stub(said):
    """An asker whose answers are `said(setting, prompt)`."""

    class Stub:
        def __init__(self, *_):
            self.spent = Spent()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def batch(self, samples, settings):
            return Batch(samples, {}, None)

        def answers(self, batch, setting, new_tokens, seed):
            with self.spent.on("model"):
                return [Answer(said(setting, s.prompt), 9, 1, 4, 2) for s in batch.samples]

    return Stub


@pytest.fixture(scope="module")
def yes_or_no(tmp_path_factory):
    """Forty questions about eight pictures; the question says what is right."""
    folder = tmp_path_factory.mktemp("pope")
    Image.new("RGB", (2, 2)).save(folder / "x.png")
    rows = [
        {
            "image": "x.png",
            "image_id": i // 5,
            "question": f"{i}",
            "answer": "no" if i % 2 else "yes",
            "metric": "yes_no",
        }
        for i in range(40)
    ]
    text = "\n".join(map(json.dumps, rows))
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_comparisons(go, tmp_path, yes_or_no, monkeypatch):
    def said(setting, prompt):
        i = int(prompt)
        right, wrong = ("no", "yes") if i % 2 else ("yes", "no")
        if setting.method == "full":
            return right if i < 30 else wrong
        if setting.method == "divprune":
            return right if i < 20 or i == 39 else wrong
        return "yes"

    monkeypatch.setattr(run, "Asker", _stub(said))
    results = go(sweeps.plan(methods=["divprune"], tasks=[str(yes_or_no)]), tmp_path)
    (task,) = results["tasks"].values()
    full, random, method = task["rows"]
    assert (task["metric"], task["questions"], task["images"]) == ("yes_no", 40, 8)
    assert [row["score"]["mean"] for row in task["rows"]] == pytest.approx([0.75, 0.5, 0.525])
    assert full["over_full"] is full["over_random"] is random["over_random"] is None
    over = method["over_full"]
    assert over["mean"] == pytest.approx(-9 / 40)
    assert over["low"] < -9 / 40 < over["high"]
    assert over["mcnemar"] == {"gained": 1, "lost": 10, "p": pytest.approx(24 / 2**11)}
    assert over["p"] == pytest.approx(4 / 8)  # 5 + 5 - 1 and 5 + 5 + 1, and their opposites
    ps = [random["over_full"]["p"], over["p"]]
    assert [random["over_full"]["p_holm"], over["p_holm"]] == holm(ps)
    assert ps[0] < 0.5
    assert method["over_random"]["mean"] == pytest.approx(1 / 40)
    assert random["rates"] == {
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "yes_rate": 1.0,
        "unclear_rate": 0.0,
    }
    assert method["tokens"] == {
        "tokens_in": 9,
        "tokens_out": 1,
        "visual_in": 4,
        "visual_kept": 2,
    }


def test_no_right_answer_is_not_certain(go, tmp_path, yes_or_no, monkeypatch):
    monkeypatch.setattr(run, "Asker", _stub(lambda setting, prompt: "perhaps"))
    results = go(sweeps.plan(methods=[], tasks=[str(yes_or_no)]), tmp_path)
    (task,) = results["tasks"].values()
    z = 1.959963984540054
    score = task["rows"][0]["score"]
    assert score["mean"] == 0
    assert score["low"] == pytest.approx(0, abs=1e-12)
    assert score["high"] == pytest.approx(z**2 / (8 + z**2))  # Wilson, none of eight images


def test_runs_of_random_methods_are_averaged_by_question(go, tmp_path, yes_or_no, monkeypatch):
    calls = []

    def said(setting, prompt):
        calls.append(setting.label)
        return "yes" if calls.count("random:0.1") <= 40 or setting.method == "full" else "no"

    monkeypatch.setattr(run, "Asker", _stub(said))
    plan = sweeps.plan(methods=["random"], seeds=2, batch=40, tasks=[str(yes_or_no)])
    results = go(plan, tmp_path)
    (task,) = results["tasks"].values()
    random = task["rows"][1]
    assert random["score"] == {"mean": 0.5, "low": 0.5, "high": 0.5}  # every question half
    assert random["over_full"]["mcnemar"] is None
    assert random["rates"]["yes_rate"] == 0.5
    name = next((tmp_path / "samples").iterdir()).name
    first, second = (sweeps.rows(tmp_path, f"random@0.1.run{i}", name) for i in range(2))
    assert first[0]["seed"] != second[0]["seed"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_questions(tmp_path):
    """Ten times the questions need no more than a few kilobytes on top."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")

    def peak(questions):
        file = tmp_path / f"{questions}.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            for i in range(questions):
                row = {"image": "x.png", "question": f"question {i}", "answer": "yes"}
                lines.write(json.dumps(row) + "\n")
        plan = sweeps.plan(tasks=[str(file)], batch=16, methods=[])
        asker = _stub(lambda setting, prompt: "yes")()
        worker = Worker(asker, plan, tmp_path / f"out{questions}", 0, Processes(), None)
        task = open_task(plan.tasks[0])
        tracemalloc.start()
        try:
            worker.ask(task)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(64)  # imports and caches
    small, large = peak(1000), peak(10_000)
    assert large - small < 100_000
    answers = store.Answers.of(tmp_path / "out10000", "10000", "full", 0)
    assert sum(answers.done()) == 10_000
