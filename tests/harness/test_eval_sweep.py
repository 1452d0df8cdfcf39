"""A sweep on an untrained model: order, resumption, failures and tokens."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from eval_harness.asking import prompt_of
from eval_harness.sweep.asker import Asker
from eval_harness.sweep.processes import Processes
from eval_harness.sweep.tasks import open_task
from eval_harness.sweep.worker import Worker
from tests.harness import sweeps
from vlmcompress import patch
from vlmcompress.core.errors import ConfigError

PATCHES = 196


@pytest.fixture
def asked(monkeypatch):
    """Every batch that a setting was really asked, as (setting, questions)."""
    seen, whole = [], Asker.answers

    def answers(self, batch, setting, *arguments):
        seen.append((setting.label, len(batch.samples)))
        return whole(self, batch, setting, *arguments)

    monkeypatch.setattr(Asker, "answers", answers)
    return seen


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of questions about noise, the third picture of which is damaged."""
    folder = tmp_path_factory.mktemp("noise")
    rows = []
    for i in range(6):
        name = f"{i}.png"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(i)
            noise = torch.randint(0, 255, (40, 50, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(folder / name)
        rows.append({"image": name, "question": "how many objects are there ?", "answer": "two"})
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    rows.append({"images": ["0.png", "1.png"], "question": "what is it ?", "answer": "red"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_everything_that_is_told(go, tmp_path, asked):
    plan = sweeps.plan(methods=["vtc_cls", "fastv@2:0.5", "blind"], seeds=2)
    results = go(plan, tmp_path)
    first = [label for label, _ in asked[:7]]
    assert first == [
        "full",
        *["random:0.1"] * 2,
        *["random:0.5"] * 2,
        "vtc_cls:0.1",
        "fastv@2:0.5",
    ]
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(results))
    assert results["complete"]
    assert results["failed"] == 0
    assert set(results["versions"]) == {"vlmcompress", "torch", "transformers"}
    assert results["machine"]["dtype"] == "float32"
    assert results["sweep"]["batch"] == 4
    task = results["tasks"]["reference"]
    assert (task["metric"], task["questions"], task["images"]) == (
        "exact_match",
        10,
        len({row["image_id"] for row in sweeps.rows(tmp_path, "full")}),
    )
    rows = {(row["method"], row["keep"]): row for row in task["rows"]}
    assert rows["full", None]["tokens"]["visual_kept"] == PATCHES
    assert rows["random", 0.1]["runs"] == 2
    assert rows["vtc_cls", 0.1]["tokens"]["visual_kept"] == 20
    assert rows["vtc_cls", 0.1]["over_random"]["questions"] == 10
    assert rows["fastv@2:0.5", None]["visual_layers"] == [PATCHES] * 2 + [98] * 3
    assert rows["blind", None]["tokens"]["visual_in"] == 0
    assert set(rows["full", None]["by_kind"]) == {r["kind"] for r in sweeps.rows(tmp_path, "full")}


def test_tokens_of_each_sample(go, tmp_path, processor):
    go(sweeps.plan(), tmp_path)
    full, short = sweeps.rows(tmp_path, "full"), sweeps.rows(tmp_path, "vtc_cls@0.1")
    for question, one, other in zip(
        open_task(sweeps.plan().tasks[0]).questions(), full, short, strict=True
    ):
        text = prompt_of(processor, question.question, 1)
        inputs = processor(text=text, images=question.pictures[0].open(), return_tensors="pt")
        assert one["tokens_in"] == inputs["input_ids"].shape[1]
        assert (one["visual_in"], one["visual_kept"]) == (PATCHES, PATCHES)
        assert (other["visual_in"], other["visual_kept"]) == (PATCHES, 20)
        assert other["tokens_in"] == one["tokens_in"] - PATCHES + 20
        assert 1 <= one["tokens_out"] <= 3
        assert other["error"] is None


def test_answers_are_those_of_a_patched_model(go, tmp_path, model, processor):
    plan = sweeps.plan(batch=1, methods=["divprune"], seed=5)
    go(plan, tmp_path)
    questions = list(open_task(plan.tasks[0]).questions())
    for setting in plan.settings:
        rows = sweeps.rows(tmp_path, setting.label.replace(":", "@"))
        for question, row in zip(questions, rows, strict=True):
            inputs = processor(
                text=prompt_of(processor, question.question, 1),
                images=question.pictures[0].open(),
                return_tensors="pt",
            )
            handle = None
            if setting.compresses:
                handle = patch(model, setting.method, keep=setting.keep, seed=row["seed"])
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            if handle:
                handle.remove()
            new = ids[0, inputs["input_ids"].shape[1] :]
            said = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
            assert row["prediction"] == said
    seeds = [row["seed"] for row in sweeps.rows(tmp_path, "random@0.1")]
    assert seeds == [5 + i for i in range(10)]


def test_reused_tower_changes_no_answer(go, tmp_path):
    methods = ["vtc_cls", "divprune", "fastervlm"]
    go(sweeps.plan(methods=methods), tmp_path / "reused")
    go(sweeps.plan(methods=methods, reuse_tower=False), tmp_path / "run")
    assert sweeps.samples(tmp_path / "reused") == sweeps.samples(tmp_path / "run")


def _interrupt_after(batches):
    passed = []

    def progress(task, total, questions):
        passed.append(questions)
        if len(passed) == batches:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_sweep_goes_on(go, tmp_path, asked):
    plan = sweeps.plan(methods=["vtc_cls", "divprune"], seeds=2)
    whole = go(plan, tmp_path / "whole")
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        go(plan, tmp_path / "stopped", progress=_interrupt_after(2))
    partial = json.loads((tmp_path / "stopped" / "results.json").read_text(encoding="utf-8"))
    assert not partial["complete"]
    assert [row["answered"] for row in partial["tasks"]["reference"]["rows"]] == [8, 8, 8, 8]
    asked.clear()
    results = go(plan, tmp_path / "stopped")
    assert [count for _, count in asked] == [2] * 5  # the last batch, of every run
    assert results["complete"]
    assert results["tasks"] == whole["tasks"]
    assert sweeps.samples(tmp_path / "stopped") == sweeps.samples(tmp_path / "whole")
    asked.clear()
    assert go(plan, tmp_path / "stopped")["tasks"] == whole["tasks"]
    assert asked == []


class _Killed(BaseException):
    """Ends a sweep as a signal does: nothing is tidied up."""


def test_a_killed_sweep_goes_on_from_torn_lines(go, tmp_path, asked, monkeypatch):
    plan = sweeps.plan()
    whole = go(plan, tmp_path / "whole")

    def killed(*_):
        raise _Killed

    with pytest.raises(_Killed):
        go(plan, tmp_path / "killed", progress=killed)
    part = tmp_path / "killed" / "samples" / "reference" / "vtc_cls@0.1.0000.part"
    part.write_bytes(part.read_bytes()[:-9])
    asked.clear()
    assert go(plan, tmp_path / "killed")["tasks"] == whole["tasks"]
    assert asked[0] == ("vtc_cls:0.1", 4)  # the batch of the torn line, as it was put together
    assert [label for label, _ in asked].count("full") == 2
    assert sweeps.samples(tmp_path / "killed") == sweeps.samples(tmp_path / "whole")


def test_methods_and_tasks_can_be_added(go, tmp_path, asked):
    go(sweeps.plan(), tmp_path)
    asked.clear()
    results = go(sweeps.plan(methods=["vtc_cls", "divprune"]), tmp_path)
    assert {label for label, _ in asked} == {"divprune:0.1"}
    assert len(results["tasks"]["reference"]["rows"]) == 4
    with pytest.raises(ConfigError, match="batch = 4"):
        go(sweeps.plan(batch=5), tmp_path)
    asked.clear()
    go(sweeps.plan(batch=5), tmp_path, fresh=True)
    assert {count for _, count in asked} == {5}


def test_processes_share_the_batches(go, tmp_path, model, processor, asked):
    plan = sweeps.plan(seeds=2)
    whole = go(plan, tmp_path / "alone")
    folder = tmp_path / "shared"
    task = open_task(plan.tasks[0])
    asked.clear()
    for rank in (1, 0):
        with Asker(model, processor, plan) as asker:
            Worker(asker, plan, folder, rank, Processes(rank, 2), None).ask(task)
        assert {count for _, count in asked} == ({4} if rank else {4, 2})
        asked.clear()
    assert len(sweeps.samples(folder)) == 8  # two parts of every run
    with pytest.raises(ConfigError, match=r"has samples and no run.json"):
        go(plan, folder)
    (folder / "run.json").write_text((tmp_path / "alone" / "run.json").read_text(), "utf-8")
    assert go(plan, folder)["tasks"] == whole["tasks"]
    assert asked == []
    assert sweeps.samples(folder) == sweeps.samples(tmp_path / "alone")


def test_a_broken_picture_is_a_failed_sample(go, tmp_path, pictures):
    results = go(sweeps.plan(tasks=[{"task": str(pictures), "name": "noise"}]), tmp_path)
    assert results["failed"] == 3  # one sample of three settings
    for label in ("full", "random@0.1", "vtc_cls@0.1"):
        rows = sweeps.rows(tmp_path, label, "noise")
        assert [row["id"] for row in rows if row["error"]] == ["2"]
        assert "image '2.png' cannot be read" in rows[2]["error"]
        assert rows[2]["score"] is rows[2]["prediction"] is None
        assert all(isinstance(row["prediction"], str) for row in rows if not row["error"])
    row = results["tasks"]["noise"]["rows"][2]
    assert (row["answered"], row["failed"]) == (6, 1)
    assert "cannot be read" in row["why"]
    assert row["over_full"]["questions"] == 6


def test_several_pictures_in_one_prompt(go, tmp_path, pictures):
    go(sweeps.plan(tasks=[{"task": str(pictures), "name": "noise"}]), tmp_path)
    full, short = (sweeps.rows(tmp_path, label, "noise")[-1] for label in ("full", "vtc_cls@0.1"))
    assert full["image_id"] == "0.png+1.png"
    assert (full["visual_in"], full["visual_kept"]) == (2 * PATCHES, 2 * PATCHES)
    assert (short["visual_in"], short["visual_kept"]) == (2 * PATCHES, 40)


class _Picky:
    """A processor that refuses pictures of one size."""

    def __init__(self, inner, size):
        self.inner, self.size = inner, size

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *, images=(), **options):
        if any(image.size == self.size for row in images for image in row):
            raise ValueError("aspect ratio of 40 is too large")
        return self.inner(images=images, **options)


def test_a_picture_that_the_processor_refuses_is_a_failed_sample(go, tmp_path, pictures, processor):
    folder = tmp_path / "task"
    folder.mkdir()
    for i, size in enumerate([(40, 50), (400, 10), (40, 50)]):
        Image.new("RGB", size).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "question": "what ?", "answer": "red"} for i in range(3)]
    text = "\n".join(map(json.dumps, rows))
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    picky = _Picky(processor, (400, 10))
    go(sweeps.plan(tasks=[str(folder)]), tmp_path / "out", processor=picky)
    found = sweeps.rows(tmp_path / "out", "full", "task")
    assert [row["error"] for row in found] == [
        None,
        "the processor refuses it: aspect ratio of 40 is too large",
        None,
    ]


def test_a_setting_that_the_library_refuses_fails_alone(go, tmp_path):
    results = go(sweeps.plan(methods=["vtc_cls", "cdpruner"]), tmp_path)
    rows = {row["method"]: row for row in results["tasks"]["reference"]["rows"]}
    assert rows["cdpruner"]["answered"] == 0
    assert rows["cdpruner"]["failed"] == results["failed"] == 10
    assert rows["cdpruner"]["why"].startswith("refused: ")
    assert "clip" in rows["cdpruner"]["why"]
    assert rows["cdpruner"]["over_full"] is rows["cdpruner"]["score"] is None
    assert rows["vtc_cls"]["failed"] == 0


def test_the_model_is_left_as_it_was(go, tmp_path, model):
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    go(sweeps.plan(), tmp_path)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()


def test_two_tasks_need_two_names(go, tmp_path):
    with pytest.raises(ConfigError, match="Two tasks are called 'reference'"):
        go(sweeps.plan(tasks=["reference", "reference"]), tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_time_is_told_apart(go, tmp_path):
    spent = go(sweeps.plan(), tmp_path)["time"]
    parts = ("questions", "pictures", "processor", "model", "harness")
    assert all(spent[name] > 0 for name in parts)
    assert sum(spent[name] for name in parts) == pytest.approx(spent["all"])
    assert spent["harness_share"] == pytest.approx(spent["harness"] / spent["model"])


def test_a_task_is_told_apart_from_its_limit(go, tmp_path):
    plan = sweeps.plan()
    go(plan, tmp_path)
    longer = replace(plan, tasks=(replace(plan.tasks[0], limit=11),))
    with pytest.raises(ConfigError, match="reference = "):
        go(longer, tmp_path)
