"""Inside the real lmms-eval: the plug-in, batches, adapters, tasks. `make test-lmms` runs it."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch

from tests.project import ROOT
from vlmcompress.core.config import CompressionConfig
from vlmcompress.core.errors import ConfigError, UnsupportedInputError, UnsupportedModelError
from vlmcompress.hub import load_adapter
from vlmcompress.integrations.lmms_eval import MODEL, TASKS
from vlmcompress.integrations.lmms_eval.options import loaded
from vlmcompress.reference import samples

pytestmark = pytest.mark.lmms

ADAPTER = ROOT / "adapters" / "atp-reference"
QUESTIONS = 8


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of our own by the template: drawn questions, and rows of a JSONL file."""
    made = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, sample in enumerate(samples("test", QUESTIONS)):
        sample.image.save(made / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": sample.question})
        rows[-1]["answers"] = [sample.answer, "something else"]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (made / "rows.jsonl").write_text(lines, encoding="utf-8")
    places = {"drawn": "reference", "rows": made / "rows.jsonl", "odd": "reference"}
    options = {"drawn": f"limit: {QUESTIONS}", "rows": "metric: vqa", "odd": "limits: 3"}
    for name, place in places.items():
        (made / f"{name}.yaml").write_text(
            f"include: {TASKS / '_vlmc_questions'}\ntask: vlmc_{name}\n"
            f"dataset_path: {place}\ndataset_kwargs: {{{options[name]}}}\n",
            encoding="utf-8",
        )
    return made


@pytest.fixture(scope="module")
def manager(folder):
    """lmms-eval's list of all tasks, which takes long to make."""
    tasks = import_module("lmms_eval.tasks")
    return tasks.TaskManager(include_path=[str(folder), str(TASKS)])


def _model(arguments, batch=1):
    kind = import_module("lmms_eval.models").get_model(MODEL)
    shared = {"batch_size": batch, "device": "cpu"}
    return kind.create_from_arg_string(f"pretrained=reference,dtype=float32,{arguments}", shared)


def _evaluated(manager, arguments="", batch=1, task="vlmc_drawn"):
    evaluator = import_module("lmms_eval.evaluator")
    return evaluator.simple_evaluate(
        model=_model(arguments, batch), tasks=[task], task_manager=manager, log_samples=True
    )


def _told(results, task="vlmc_drawn"):
    """[(answer, tokens in, tokens out)] in order of the questions."""
    rows = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    counts = [row["token_counts"][0] for row in rows]
    return [
        (row["resps"][0][0], count["input_tokens"], count["output_tokens"])
        for row, count in zip(rows, counts, strict=True)
    ]


@pytest.fixture(scope="module")
def alone(manager):
    return _evaluated(manager, "method=vtc_cls,keep=0.1")


def test_lmms_eval_finds_the_model_by_its_entry_point():
    kind = import_module("lmms_eval.models").get_model(MODEL)
    assert (kind.__name__, kind.is_simple) == ("VLMCompress", False)


def test_the_shipped_tasks_are_listed_and_their_functions_are_there(manager):
    load = import_module("lmms_eval.utils").load_yaml_config
    for file in TASKS.glob("*.yaml"):
        config = load(str(file))
        assert config["task"] in manager.all_tasks
        assert callable(config["doc_to_visual"])
        assert callable(config["process_results"])


def test_counts_are_those_of_the_compressed_prompt(manager, alone):
    full = _told(_evaluated(manager))
    short = _told(alone)
    assert len(short) == QUESTIONS
    assert {f[1] - s[1] for f, s in zip(full, short, strict=True)} == {196 - 20}
    assert all(written == 2 for _, _, written in short)  # a word and the end


def test_the_summary_has_the_time_to_the_first_token(alone):
    told = alone["throughput"]
    assert 0 < told["avg_model_ttft"] <= told["total_elapsed_time"]
    assert told["avg_latency"] == pytest.approx(told["total_elapsed_time"] / QUESTIONS)


def test_a_batch_is_its_questions_alone(manager, alone):
    assert _told(_evaluated(manager, "method=vtc_cls,keep=0.1", batch=3)) == _told(alone)


def test_rows_of_a_file_are_scored_by_their_metric(manager, alone):
    rows = _evaluated(manager, "method=vtc_cls,keep=0.1", task="vlmc_rows")
    assert _told(rows, "vlmc_rows") == _told(alone)
    # Two accepted answers, as of two annotators: one of two others agrees, in one of two ways.
    drawn = alone["results"]["vlmc_drawn"]["score,none"]
    assert drawn > 0
    assert rows["results"]["vlmc_rows"]["score,none"] == pytest.approx(drawn / 6)


def _by_hand(adapter):
    """Answers and counts of the questions with an adapter, without lmms-eval."""
    model, processor = loaded("reference", "float32", "cpu")
    handle, told = load_adapter(model, adapter, processor=processor), []
    for sample in samples("test", QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        chat = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=prompt, images=sample.image, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(new, skip_special_tokens=True)
        told.append((text, handle.last.short_length, len(new)))
    return told


@pytest.mark.parametrize("what", ["trained", "saved"])
def test_an_adapter_answers_as_by_hand(manager, what, tmp_path):
    if what == "saved":
        CompressionConfig.from_spec("divprune:0.2", positions="original").save(tmp_path)
    adapter = ADAPTER if what == "trained" else tmp_path
    assert _told(_evaluated(manager, f"adapter={adapter}")) == _by_hand(adapter)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ("methods=vtc_cls", ConfigError, "Did you mean 'method'"),
        ("method=vtc_cls,keep=2.5", ConfigError, "keep is 2.5"),
        ("attn_implementation=none_such", UnsupportedModelError, "cannot be loaded"),
    ],
)
def test_bad_arguments_are_refused_at_the_start(arguments, error, told):
    with pytest.raises(error, match=told):
        _model(arguments)


def test_a_bad_batch_size_is_refused():
    with pytest.raises(ConfigError, match="batch_size is 'auto'"):
        _model("", batch="auto")


def test_unknown_options_of_a_task_are_refused(manager):
    with pytest.raises(ConfigError, match="Did you mean 'limit'"):
        manager.load_task_or_group(["vlmc_odd"], "chat")


def test_what_is_no_picture_and_no_single_turn_is_refused():
    model, chat = _model(""), import_module("lmms_eval.protocol").ChatMessages
    video = {"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}
    with pytest.raises(UnsupportedInputError, match="pictures only"):
        model._inputs([chat(messages=[video])])
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UnsupportedInputError, match="choose a"):
            ask([])
