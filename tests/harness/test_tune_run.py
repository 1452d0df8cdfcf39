"""Tuning an untrained model: files, resumption, refusals, the command line and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval_harness.tune import models, run
from eval_harness.tune.goal import Goal
from eval_harness.tune.halving import Rules
from eval_harness.tune.models import ModelJudge
from eval_harness.tune.plan import TunePlan
from vlmcompress import CompressionConfig, patch
from vlmcompress.cli import app
from vlmcompress.core.errors import ConfigError, ResultsError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tuning.md"
SPACE = ("divprune:0.5", "vtc_cls:0.25 | fastv@2:0.5")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder of questions, each about a picture of its own, which the full model answers."""
    from eval_harness.sweep.tasks import TaskConfig, open_task

    folder = tmp_path_factory.mktemp("questions")
    seen, rows = set(), []
    for question in open_task(TaskConfig("reference", limit=200)).questions():
        if question.image_id in seen or len(rows) == 20:
            continue
        seen.add(question.image_id)
        question.pictures[0].open().save(folder / f"{len(rows)}.png")
        rows.append(
            {
                "image": f"{len(rows)}.png",
                "question": question.question,
                "answer": "none",
                "metric": "anls",
            }
        )
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return folder


@pytest.fixture
def tune(model, processor, questions, monkeypatch):
    """Tune the untrained model, where an answer is right as often as its pipeline's name says."""
    from eval_harness.sweep.tasks import TaskConfig

    task = TaskConfig(str(questions), new_tokens=1)

    def go(folder, *, right=("divprune:0.5", None), progress=None, fresh=False, **options):
        asked = []
        whole = ModelJudge._ask

        def ask(self, spec, batch):
            asked.append((spec, len(batch)))
            told = whole(self, spec, batch)
            assert len(told["scores"]) == len(batch)
            return {**told, "scores": [float(spec in right)] * len(batch)}

        goal = options.pop("goal", Goal(keep_accuracy=0.5, alpha=0.2))
        given = {"space": SPACE, "rules": Rules(first=4), "cost": "flops", "batch": 8}
        plan = TunePlan("untrained", (task,), goal, **{**given, **options})
        with monkeypatch.context() as patched:
            patched.setattr(ModelJudge, "_ask", ask)
            load = lambda: (model, processor, None)  # noqa: E731
            told = run.tune(plan, folder, load, fresh=fresh, progress=progress)
        return told, asked

    return go


def _plain(told):
    """What must not differ between two runs."""
    return {k: v for k, v in told.items() if k not in ("seconds", "machine")}


def test_the_configuration_and_its_evidence(tune, tmp_path, model):
    told, asked = tune(tmp_path)
    assert (told["status"], told["pipeline"]) == ("chosen", "divprune:0.5")
    assert told["p"] <= 0.2
    assert json.loads((tmp_path / "tune.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(told)
    )
    rows = {row["pipeline"]: row for row in told["space"]}
    assert rows["divprune:0.5"]["decision"] == "chosen"
    assert rows[SPACE[1]]["decision"] == "dropped"
    assert rows[SPACE[1]]["cost"] < rows["divprune:0.5"]["cost"] < 1
    assert told["samples"]["images"] == {"search": 10, "held_out": 10}
    assert told["asked"]["questions"] == sum(n for _, n in asked) < told["asked"]["exhaustive"]
    config = CompressionConfig.load(tmp_path)
    assert config.to_spec() == "divprune:0.5"
    with patch(model, config) as handle:
        assert "divprune" in str(handle.report)


def test_answers_are_those_of_the_model(tune, tmp_path, model, processor, questions):
    from eval_harness.tune.budget import Budget
    from eval_harness.tune.samples import Samples

    seen = []
    tune(tmp_path, progress=seen.append)
    assert any(line.startswith("divprune:0.5: ") for line in seen)
    options = {"cost": "flops", "batch": 3, "space": SPACE}
    from eval_harness.sweep.tasks import TaskConfig

    plan = TunePlan(
        "untrained",
        (TaskConfig(str(questions), new_tokens=1),),
        Goal(keep_accuracy=0.5),
        **options,
    )
    samples = Samples.read(plan.tasks, held_out=0.5, seed=0)
    judge = ModelJudge(model, processor, None, plan, samples, tmp_path / "other", Budget())
    whole, part = judge.scores(None, "search", 0, 6), judge.scores(None, "search", 3, 6)
    assert whole.values.tolist()[3:] == part.values.tolist()
    assert whole.images.tolist() == [0, 1, 2, 3, 4, 5]
    assert judge.scores(SPACE[0], "held_out", 0, 2).images.tolist() == [10, 11]


def test_a_stopped_run_goes_on_to_the_same_choice(tune, tmp_path):
    whole, every = tune(tmp_path / "whole")
    steps = []

    def stop(line):
        steps.append(line)
        if line.endswith("questions") and len(steps) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "stopped", progress=stop)
    assert not (tmp_path / "stopped" / "tune.json").exists()
    again, left = tune(tmp_path / "stopped")
    assert _plain(again) == _plain(whole)
    assert 0 < len(left) < len(every)
    third, nothing = tune(tmp_path / "stopped")
    assert (nothing, _plain(third)) == ([], _plain(whole))
    _, anew = tune(tmp_path / "stopped", fresh=True)
    assert anew == every


def test_without_a_choice_no_configuration_stays(tune, tmp_path):
    tune(tmp_path)
    assert (tmp_path / "vlmcompress_config.json").exists()
    told, _ = tune(tmp_path, goal=Goal(keep_accuracy=0.99, alpha=0.2))
    assert told["status"] == "none"
    assert 0.5 < told["reachable"] < 0.99
    assert told["images_needed"] > 10
    assert not (tmp_path / "vlmcompress_config.json").exists()


def test_refused_pipelines_are_told(tune, tmp_path):
    told, _ = tune(tmp_path, space=(*SPACE, "cdpruner:0.5"))
    row = next(row for row in told["space"] if row["pipeline"] == "cdpruner:0.5")
    assert row["decision"] == "dropped"
    assert "read(s) the question" in row["why"]
    with pytest.raises(ConfigError, match=r"None of the pipelines .* read\(s\) the question"):
        tune(tmp_path / "none", space=("cdpruner:0.5",))


def test_measured_times(tune, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_FRESH_ROUNDS", 5)
    goal = Goal(max_seconds=1000.0, alpha=0.2)
    told, _ = tune(tmp_path, cost="ttft", rounds=3, goal=goal, right=SPACE[:1])
    assert (told["status"], told["pipeline"]) == ("chosen", "divprune:0.5")
    facts = told["space"][0]["cost_facts"]
    assert len(facts["shares"]) == len(facts["seconds"]) == 3
    assert {"processor", "tower", "prefill"} <= set(facts["stages"])
    slow, _ = tune(tmp_path, cost="ttft", rounds=3, goal=Goal(max_seconds=1e-6))
    assert slow["status"] == "none"


def test_a_folder_that_another_run_holds(tune, tmp_path):
    from eval_harness.sweep import store

    with store.locked(tmp_path), pytest.raises(ResultsError, match="Another sweep writes"):
        tune(tmp_path)


def test_too_few_pictures(tune, tmp_path):
    with pytest.raises(ConfigError, match="both parts need 8 images"):
        tune(tmp_path, held_out=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Give a floor on accuracy or a ceiling"),
        (["--keep-accuracy", "1.5"], "between 0 and 1"),
        (["--max-ttft", "soon"], "150ms"),
        (["--keep-accuracy", "0.9", "--budget", "soon"], "30m"),
        (["--keep-accuracy", "0.9", "--cost", "euro"], "ttft, flops"),
        (["--max-ttft", "90ms", "--cost", "flops"], "no seconds"),
    ],
)
def test_the_command_refuses(options, words, tmp_path):
    given = ["tune", "--out", str(tmp_path / "out"), "--tasks", "reference", *options]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 1
    assert words in found.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_and_the_page(reference_folder, questions, tmp_path, monkeypatch):
    from vlmcompress.reference import weights

    monkeypatch.setattr(weights, "WEIGHTS_DIR", reference_folder)
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text("pipelines: ['divprune:0.9']\n", encoding="utf-8")
    rows = (questions / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    Path("mine.jsonl").write_text(
        "".join(
            json.dumps({**json.loads(row), "image": str(questions / json.loads(row)["image"])})
            + "\n"
            for row in rows
        ),
        encoding="utf-8",
    )
    asked = ["tune", "--out", "runs/tune", "--tasks", "mine.jsonl", "--space", "space.yaml"]
    found = CliRunner().invoke(
        app, [*asked, "--max-ttft", "0.99", "--cost", "flops", "--new-tokens", "2"]
    )
    assert found.exit_code == 0, found.output
    assert "divprune:0.9: at most 99 % of the full model's cost" in found.output
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    said = snippet.replace("llava-hf/llava-1.5-7b-hf", str(reference_folder))
    space: dict = {}
    exec(compile(said, PAGE.name, "exec", dont_inherit=True), space)
    assert "divprune:0.9" in str(space["handle"].report)
    space["handle"].remove()
