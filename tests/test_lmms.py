"""What of the lmms-eval plug-in needs no lmms-eval; the rest is in tests/lmms."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from eval_harness.lmms import equality, runs
from eval_harness.lmms.runs import Outcome, Run
from eval_harness.sweep.asker import lengths
from eval_harness.sweep.tasks import TaskConfig, open_task
from tests.project import ROOT, project
from vlmcompress import patch
from vlmcompress.cli import app
from vlmcompress.core.errors import (
    ConfigError,
    ConfigTypeError,
    DataError,
    MissingExtraError,
    ResultsError,
    UnknownMethodError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from vlmcompress.integrations.lmms_eval import TASKS, documents
from vlmcompress.integrations.lmms_eval.options import Options, loaded
from vlmcompress.integrations.lmms_eval.recording import dropped_of, generate

ADAPTER = str(ROOT / "adapters" / "atp-reference")


def test_the_entry_point_is_registered_and_there():
    (name, place), *more = project()["entry-points"]["lmms_eval.models"].items()
    assert (name, more) == ("vlmcompress", [])
    module, _, function = place.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_loading_the_entry_point_imports_nothing_heavy():
    """One that fails, or takes long, does so in every run of lmms-eval."""
    heavy = {"torch", "transformers", "lmms_eval", "eval_harness", "peft"}
    code = f"import sys, vlmcompress.integrations.lmms_eval; print(*{heavy!r} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# Options


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"pretrained": ""}, ConfigError, "pretrained is missing"),
        ({"pretrained": 7}, ConfigTypeError, "pretrained is 7"),
        ({"method": "vtc_clss", "keep": 0.1}, UnknownMethodError, "Did you mean 'vtc_cls'"),
        ({"method": "vtc_cls"}, ConfigError, "keep"),
        ({"keep": True}, ConfigTypeError, "keep is True"),
        ({"keep": 0.0}, ConfigError, "keep is 0.0"),
        ({"keep": 0.1, "positions": "compact"}, ConfigError, "positions is 'compact'"),
        ({"keep": 0.1, "seed": "x"}, (ConfigError, ConfigTypeError), "seed"),
        ({"positions": "original"}, ConfigError, "nothing is compressed"),
        ({"adapter": ADAPTER, "method": "atp"}, ConfigError, "method=atp is of no use"),
        ({"adapter": ADAPTER, "seed": 3}, ConfigError, "seed=3 is of no use"),
        ({"adapter": "no/such/folder"}, ConfigError, "no adapter"),
    ],
)
def test_options_without_sense_are_refused(given, error, told):
    with pytest.raises(error, match=told):
        Options(**{"pretrained": "reference", **given})


@pytest.mark.parametrize(
    "given", [{}, {"keep": 64}, {"keep": "auto"}, {"method": "vtc_cls:0.25 | fastv@2:0.5"}]
)
def test_options_with_sense_are_taken(given):
    assert Options("reference", **given).compresses == bool(given)


def test_a_model_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UnsupportedModelError, match="cannot be loaded"):
        loaded(str(tmp_path))
    with pytest.raises(ConfigError, match="dtype is 'float8'"):
        loaded("reference", dtype="float8")


# What a model read and wrote


@pytest.fixture(scope="module")
def model_and_processor():
    return loaded("reference", "float32", "cpu")


@pytest.fixture
def inputs(model_and_processor):
    """Prompts with one picture, none and two."""
    _, processor = model_and_processor
    texts = []
    for count in (1, 0, 2):
        content = [{"type": "image"}] * count + [{"type": "text", "text": "Name it." * (1 + count)}]
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    pictures = [Image.effect_noise((224, 224), 60 + i).convert("RGB") for i in range(3)]
    processor.tokenizer.padding_side = "left"
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def test_prompts_are_counted_as_the_language_model_saw_them(model_and_processor, inputs):
    model, _ = model_and_processor
    whole = generate(model, None, inputs, max_new_tokens=3, do_sample=False)
    assert whole.read == inputs["attention_mask"].sum(1).tolist()
    with patch(model, "uniform", keep=9) as handle:
        short = generate(model, handle, inputs, max_new_tokens=3, do_sample=False)
        longest = handle.last.short_length
    assert [a - b for a, b in zip(whole.read, short.read, strict=True)] == [187, 0, 374]
    assert max(short.read) == longest
    assert short.ids.shape == (3, max(short.written))
    assert 0 < short.ttft <= short.seconds


def test_a_call_without_pictures_is_not_counted_by_the_one_before(model_and_processor, inputs):
    model, processor = model_and_processor
    with patch(model, "uniform", keep=9) as handle:
        generate(model, handle, inputs, max_new_tokens=1, do_sample=False)
        text = processor(text=["Name it."], return_tensors="pt")
        assert generate(model, handle, text, max_new_tokens=1, do_sample=False).read == [
            text["input_ids"].shape[1]
        ]


def test_images_fill_the_prompts_in_order():
    record = SimpleNamespace(tokens_before=(4, 6, 5), tokens_after=(1, 2, 5))
    assert dropped_of(record, [4, 0, 11]) == [3, 0, 4]
    assert dropped_of(None, [4, 0]) == [0, 0]


def test_answers_end_with_their_end():
    new = torch.tensor([[5, 1, 0, 0], [5, 6, 7, 8], [5, 2, 1, 0]])
    assert lengths(new, 1) == [2, 4, 3]
    assert lengths(new, [1, 2]) == [2, 4, 2]
    assert lengths(new, None) == [4, 4, 4]


# Tasks


class _Loader(yaml.SafeLoader):
    """Reads `!function a.b` as the text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def _config(path: Path) -> dict:
    config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    included = config.pop("include", None)
    return {**(_config(path.parent / included) if included else {}), **config}


TASK_FILES = sorted(TASKS.glob("*.yaml"))


@pytest.mark.parametrize("path", TASK_FILES, ids=lambda path: path.stem)
def test_tasks_are_complete(path):
    config = _config(path)
    assert config["task"] == path.stem
    assert path.stem.startswith("vlmc_")  # lmms-eval's own tasks win over others of their names
    assert config["output_type"] == "generate_until"
    assert {"dataset_path", "test_split", "doc_to_text", "process_results"} <= set(config)
    assert all(metric["aggregation"] for metric in config["metric_list"])
    for value in config.values():
        if isinstance(value, str) and value.startswith("vlmcompress."):
            module, _, name = value.rpartition(".")
            tree = ast.parse(Path(find_spec(module).origin).read_text(encoding="utf-8"))
            assert name in {getattr(node, "name", None) for node in tree.body}


def test_there_are_tasks_for_both_worlds():
    places = {_config(path)["dataset_path"] for path in TASK_FILES}
    assert {"reference", "reference_text"} <= places


def test_the_path_is_printed():
    printed = CliRunner().invoke(app, ["lmms-path"]).output.strip()
    assert Path(printed) == TASKS
    assert (TASKS / "_vlmc_questions").is_file()


def test_documents_show_what_the_sweep_shows(tmp_path):
    Image.effect_noise((30, 20), 80).convert("L").save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "What?", "options": ["a", "b"], "answer": "B"}
    row = {**row, "metric": "multiple_choice"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    for place in ("reference", str(tmp_path / "rows.jsonl")):
        task = open_task(TaskConfig(place, limit=3))
        questions = [*task.questions()]
        made = [*documents.documents(task)]
        assert len(made) == len(questions)
        for doc, question in zip(made, questions, strict=True):
            (shown,), (picture,) = documents.doc_to_visual(doc), question.pictures
            assert shown.tobytes() == picture.open().tobytes()
            assert documents.doc_to_text(doc) == task.prompt(question)
            assert documents.doc_to_target(doc) == question.answers[0]
            right = documents.process_results(doc, [f" {question.answers[0]}"])
            assert (right, documents.process_results(doc, ["?"])) == ({"score": 1.0}, {"score": 0})


def test_rows_that_cannot_be_asked_stop_lmms_eval(tmp_path):
    good = {"image": "a.png", "question": "What?", "answer": "b"}
    lines = [json.dumps(good), json.dumps({**good, "question": ""})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    made = documents.documents(open_task(TaskConfig(str(tmp_path / "rows.jsonl"))))
    with pytest.raises(UnsupportedInputError, match=r"a\.png"):
        documents.doc_to_visual(next(made))
    with pytest.raises(DataError, match="row 1"):
        next(made)


# Runs


RUN = Run({"pretrained": "reference", "clip": None, "keep": 0.1}, ["pope", "x"], Path("out"))


def test_the_command_is_one_that_can_be_typed():
    assert str(RUN) == (
        "python -m lmms_eval --model vlmcompress --model_args pretrained=reference,keep=0.1 "
        f"--tasks pope,x --include_path {TASKS} --batch_size 1 --log_samples --output_path out"
    )


def test_values_with_commas_are_refused():
    with pytest.raises(ConfigError, match="splits arguments at commas"):
        Run({"method": "a(b=1,c=2)"}, ["pope"], Path("out"))


def test_without_lmms_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "vlmcompress\[lmms\]"'):
        runs.go(RUN)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """lmms-eval that writes what it is told to; gives the run and what it is called with."""
    monkeypatch.setattr(runs, "installed", lambda: True)
    written, calls = {}, []

    def run(command, env, **_):
        calls.append((command, env))
        for name, content in written.items():
            (tmp_path / "out" / "model").mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / "model" / name).write_text(content, encoding="utf-8")
        return SimpleNamespace(returncode=0, stdout="line\nTypeError: why")

    monkeypatch.setattr(runs.subprocess, "run", run)
    return SimpleNamespace(written=written, calls=calls, run=Run({}, ["x"], tmp_path / "out"))


def test_an_lmms_eval_that_fails_is_an_error_though_it_ends_with_0(fake):
    with pytest.raises(ResultsError, match="TypeError: why"):
        runs.go(fake.run)


def test_results_and_samples_are_read(fake):
    scores = {"alias": "x", "score,none": 0.5, "score_stderr,none": "N/A"}
    fake.written["1_results.json"] = json.dumps({"results": {"x": scores}})
    fake.written["1_samples_x.jsonl"] = '{"doc_id": 1}\n{"doc_id": 0}\n'
    outcome = runs.go(fake.run)
    assert [row["doc_id"] for row in outcome.samples["x"]] == [0, 1]
    assert outcome.metric("x", "score") == 0.5
    with pytest.raises(ResultsError, match=r"no 'f1' for 'x', only \['score'\]"):
        outcome.metric("x", "f1")
    ((command, environment),) = fake.calls
    assert command[0] == sys.executable
    assert environment["HF_HUB_OFFLINE"] == "1"


# Equality


def _sides():
    ours = [
        {"index": i, "answers": ["b"], "prediction": "b", "score": 1.0, "visual_kept": 20}
        | {"tokens_in": 30, "tokens_out": 2}
        for i in range(3)
    ]
    counts = {"input_tokens": 30, "output_tokens": 2}
    theirs = [
        {"doc_id": i, "target": "b", "resps": " b", "score": 1.0, "token_counts": [counts]}
        for i in range(3)
    ]
    return ours, theirs


def test_equal_samples_are_equal():
    cell = equality.side_by_side(*_sides())
    assert cell["questions"] == cell["equal_answers"] == cell["equal_tokens_in"] == 3
    assert equality.is_equal({**cell, "lmms_score": 1.0})
    assert not equality.is_equal({**cell, "lmms_score": 0.9})


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("equal_answers", {"resps": "c"}),
        ("equal_scores", {"score": 0.0}),
        ("equal_tokens_in", {"token_counts": [{"input_tokens": 206, "output_tokens": 2}]}),
        ("equal_tokens_out", {"token_counts": [{"input_tokens": 30, "output_tokens": 3}]}),
    ],
)
def test_a_single_difference_is_seen(name, changed):
    ours, theirs = _sides()
    theirs[1] |= changed
    cell = equality.side_by_side(ours, theirs)
    assert cell[name] == 2
    assert not equality.is_equal({**cell, "lmms_score": 1.0})


@pytest.mark.parametrize("change", [{"target": "c"}, {"doc_id": 7}])
def test_other_questions_are_no_comparison(change):
    ours, theirs = _sides()
    theirs[2] |= change
    with pytest.raises(ResultsError, match="not of the same questions"):
        equality.side_by_side(ours, theirs)


def test_the_committed_comparison_is_equal_and_of_compressed_prompts():
    results = json.loads((ROOT / "eval_harness/results/lmms.json").read_text(encoding="utf-8"))
    cells = [cell for cells in results["tasks"].values() for cell in cells.values()]
    assert results["equal"]
    assert all(map(equality.is_equal, cells))
    for cells in results["tasks"].values():
        full, short = cells.values()
        assert full["tokens_in"][1] - short["tokens_in"][1] == pytest.approx(
            full["visual_kept"] - short["visual_kept"]
        )
        assert short["visual_kept"] < full["visual_kept"]


def test_an_outcome_gives_scores_only():
    outcome = Outcome({"results": {"x": {"alias": "x", "a,none": 1, "b,strict": 2.5}}}, {})
    assert outcome.scores("x") == {"a": 1, "b": 2.5}
