"""Questions from files and from the generator, and a sweep's options."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval_harness.sweep.plan import plan_of, read_yaml
from eval_harness.sweep.questions import Picture
from eval_harness.sweep.settings import Setting, settings_of
from eval_harness.sweep.tasks import TaskConfig, open_task
from vlmcompress.core.errors import ConfigError, UnknownMethodError, UnsupportedInputError
from vlmcompress.reference import samples


def _png(colour, size=(4, 4)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def _write(folder, rows):
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shapes").mkdir()
    for name in ("red", "blue"):
        (tmp_path / "shapes" / f"{name}.png").write_bytes(_png(name))
    return _write(
        tmp_path / "shapes",
        [
            {"id": "a", "image": "red.png", "question": "Colour?", "answer": "red", "split": "dev"},
            {
                "images": ["red.png", "blue.png"],
                "question": "Same?",
                "answers": ["no", "No way"],
                "split": "test",
                "metric": "anls",
                "kind": "pair",
            },
            {
                "image": "blue.png",
                "image_id": "b",
                "question": "Which?",
                "answer": "B",
                "options": ["red", "blue"],
                "metric": "multiple_choice",
                "split": "test",
            },
        ],
    )


def _questions(task, **options):
    return list(open_task(TaskConfig(str(task), **options)).questions())


def test_a_folder(folder):
    first, second, third = _questions(folder)
    assert (first.id, first.answers, first.metric) == ("a", ("red",), "exact_match")
    assert first.pictures[0].open().getpixel((0, 0)) == (255, 0, 0)
    assert first.image_id == first.pictures[0].key == "red.png"
    assert (second.id, second.metric, second.kind) == ("1", "anls", "pair")
    assert second.answers == ("no", "No way")
    assert [p.open().getpixel((0, 0)) for p in second.pictures] == [(255, 0, 0), (0, 0, 255)]
    assert third.image_id == "b"
    assert third.options == ("red", "blue")
    assert not any(question.error for question in (first, second, third))


def test_a_file_a_split_and_a_limit(folder):
    assert len(_questions(folder / "questions.jsonl")) == 3
    assert [q.id for q in _questions(folder, split="test")] == ["1", "2"]
    assert [q.id for q in _questions(folder, split="test", limit=1)] == ["1"]
    task = open_task(TaskConfig(str(folder), limit=2))
    assert (task.name, task.total) == ("shapes", 2)
    with pytest.raises(ConfigError, match="no rows of split 'train'"):
        _questions(folder, split="train")


def test_parquet_files(tmp_path):
    rows = [
        {
            "id": i,
            "image": {"bytes": _png(colour), "path": None},
            "question": "Colour?",
            "answers": [colour, colour.upper()],
        }
        for i, colour in enumerate(("red", "blue", "red"))
    ]
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(rows[part::2]), tmp_path / f"part-{part}.parquet")
    found = _questions(tmp_path, metric="vqa")
    assert [question.id for question in found] == ["0", "2", "1"]  # file by file
    assert found[0].image_id == found[1].image_id != found[2].image_id  # equal pictures
    assert found[2].pictures[0].open().getpixel((0, 0)) == (0, 0, 255)
    assert found[0].answers == ("red", "RED")
    assert found[0].metric == "vqa"
    assert open_task(TaskConfig(str(tmp_path))).total == 3
    assert len(_questions(tmp_path / "part-1.parquet")) == 1


def test_the_generator():
    drawn = list(samples("validation", 5, world="text"))
    found = _questions("reference_text", split="validation", limit=5)
    assert [q.question for q in found] == [s.question for s in drawn]
    assert [q.answers for q in found] == [(s.answer,) for s in drawn]
    assert [q.image_id for q in found] == [str(s.scene_id) for s in drawn]
    assert found[0].pictures[0].open().tobytes() == drawn[0].image.convert("RGB").tobytes()


def test_prompts(folder):
    task = open_task(TaskConfig(str(folder)))
    asked = [task.prompt(question) for question in task.questions()]
    assert asked[0] == "Colour?"
    assert asked[2] == "Which?\nA. red\nB. blue\nAnswer with the letter of the right option."
    task = open_task(TaskConfig(str(folder), prompt="{question} One word."))
    assert {task.prompt(q).removeprefix(q.question) for q in task.questions()} == {" One word."}


def test_rows_that_cannot_be_asked_say_why(folder):
    good = {"image": "red.png", "question": "?", "answer": "x"}
    bad = [
        ({**good, "question": " "}, "'question' is ' '"),
        ({**good, "answer": None}, "no 'answer'"),
        ({**good, "image": None}, "no 'image'"),
        ({**good, "image": 3}, "an image is 3"),
        ({**good, "metric": "bleu"}, "Unknown metric 'bleu'"),
        ({**good, "metric": "multiple_choice", "options": ["y", "z"]}, "neither the text nor"),
        ('{"image": ', "line 8, is no JSON"),
        ("[1]", "line 9: no object"),
    ]
    _write(folder, [good, *(row for row, _ in bad)])
    first, *rest = _questions(folder)
    assert not first.error
    for question, (_, why) in zip(rest, bad, strict=True):
        assert why in question.error
    _write(folder, [bad[0][0], good])
    with pytest.raises(ConfigError, match="cannot be asked: row 0: its 'question'"):
        open_task(TaskConfig(str(folder)))


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("referense", r"Unknown task 'referense'\. Did you mean 'reference'"),
        ("{}/shape", r"Did you mean '.*shapes'"),
        ("{}", "holds neither questions.jsonl nor Parquet"),
        ("{}/shapes/red.png", "is no task; allowed are .jsonl and .parquet"),
        ("{}/broken.parquet", "no Parquet file"),
    ],
)
def test_unknown_tasks(folder, task, why):
    (folder.parent / "broken.parquet").write_bytes(b"PAR1 and no more")
    if task == "{}":
        (folder.parent / "broken.parquet").unlink()
    with pytest.raises(ConfigError, match=why):
        open_task(TaskConfig(task.format(folder.parent)))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"metric": "rouge"}, "Unknown metric 'rouge'"),
        ({"prompt": "Answer!"}, r"must hold \{question\}"),
        ({"limit": 0}, "limit of task 'x' is 0"),
        ({"new_tokens": 1.5}, "new_tokens of task 'x' is 1.5"),
    ],
)
def test_task_options_are_checked(options, why):
    with pytest.raises(ConfigError, match=why):
        TaskConfig("x", **options)


def test_other_questions_are_another_task(folder):
    def identity(**options):
        return open_task(TaskConfig(str(folder), **options)).identity

    assert identity() == identity()
    assert identity() != identity(limit=1)
    assert identity() != identity(prompt="{question}!")
    before = identity()
    text = (folder / "questions.jsonl").read_text(encoding="utf-8")
    (folder / "questions.jsonl").write_text(text.replace("Same?", "Equal?"), encoding="utf-8")
    assert identity() != before


@pytest.mark.parametrize("content", [b"", b"no picture", _png("red", (64, 64))[:90]])
def test_broken_pictures_say_so(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    for value in ("x.png", {"bytes": content or b"\0"}):
        with pytest.raises(UnsupportedInputError, match="cannot be read"):
            Picture.of(value, tmp_path).open()


def test_a_missing_picture_says_so(tmp_path):
    with pytest.raises(UnsupportedInputError, match=r"'gone.png' cannot be read"):
        Picture.of("gone.png", tmp_path).open()


def test_pictures_are_upright_and_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    Image.new("L", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    found = Picture.of("x.jpg", tmp_path).open()
    assert (found.size, found.mode) == ((4, 8), "RGB")


def test_controls_come_first():
    found = settings_of(["divprune", "uniform"], [0.25, 8], seeds=3)
    assert found == (
        Setting("full"),
        Setting("random", 0.25, runs=3),
        Setting("random", 8, runs=3),
        Setting("divprune", 0.25, 0.25),
        Setting("divprune", 8, 8),
        Setting("uniform", 0.25, 0.25),
        Setting("uniform", 8, 8),
    )


@pytest.mark.parametrize(
    ("method", "share"),
    [
        ("vtc_cls:0.25", 0.25),
        ("vtc_cls:0.5 | fastv@2:0.5", 0.25),
        ("vtc_cls:32 | fastv@2:0.5", 16),
        ("fastv@2:12", 12),
        ("vtc_cls:auto", None),
    ],
)
def test_specs_are_compared_with_random_at_what_they_leave(method, share):
    found = settings_of([method], [0.1])
    assert found[-1] == Setting(method, None, share)
    randoms = [setting.keep for setting in found if setting.method == "random"]
    assert randoms == ([] if share is None else [share])


def test_methods_with_keeps_of_their_own():
    found = settings_of(["blind"], [0.1])
    assert found == (Setting("full"), Setting("blind"))
    found = settings_of([{"method": "vtc_cls", "keeps": [4, "auto"]}, "full"], [0.1])
    assert [setting.label for setting in found] == ["full", "random:4", "vtc_cls:4", "vtc_cls:auto"]


@pytest.mark.parametrize(
    ("methods", "keeps", "why"),
    [
        (["divprune"], [], "does not say how much it keeps"),
        (["divprune", "divprune"], [0.1], "Asked twice: divprune:0.1"),
        (["divprune"], [0.0], "keep is 0.0"),
        ([{"method": "vtc_cls:0.1", "keeps": [0.2]}], [], "and so do its keeps"),
        ([{"methods": "divprune"}], [0.1], "A method is"),
        (["divprune("], [0.1], "cannot be read"),
    ],
)
def test_settings_that_make_no_sense(methods, keeps, why):
    with pytest.raises(ConfigError, match=why):
        settings_of(methods, keeps)


def test_unknown_methods():
    with pytest.raises(UnknownMethodError, match="Did you mean 'divprune'"):
        settings_of(["divprun"], [0.1])


def test_a_yaml_file(tmp_path, folder):
    (tmp_path / "sweep.yaml").write_text(
        f"""
model: reference
tasks:
  - reference
  - {{task: {folder}, metric: vqa, limit: 2, name: mine}}
methods: [divprune, {{method: vtc_cls, keeps: 0.5}}]
keeps: [0.1]
seeds: 2
limit: 40
batch: 8
""",
        encoding="utf-8",
    )
    plan = plan_of(read_yaml(tmp_path / "sweep.yaml"))
    assert plan.tasks == (
        TaskConfig("reference", limit=40),
        TaskConfig(str(folder), name="mine", metric="vqa", limit=2),
    )
    labels = [setting.label for setting in plan.settings]
    assert labels == ["full", "random:0.1", "random:0.5", "divprune:0.1", "vtc_cls:0.5"]
    assert plan.settings[1].runs == 2
    assert (plan.batch, plan.model) == (8, "reference")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"task": "reference"}, "Unknown option 'task'. Did you mean 'tasks'"),
        ({}, "needs tasks"),
        ({"tasks": [{"task": "reference", "metrics": "vqa"}]}, "Did you mean 'metric'"),
        ({"tasks": [3]}, "A task is 3"),
        ({"tasks": "reference", "positions": "both"}, "positions is 'both'"),
        ({"tasks": "reference", "batch": 0}, "batch is 0"),
        ({"tasks": "reference", "seeds": 0}, "seeds is 0"),
    ],
)
def test_options_that_make_no_sense(options, why):
    with pytest.raises(ConfigError, match=why):
        plan_of(options)


@pytest.mark.parametrize("text", ["[1]", "a: [", "\0"])
def test_files_that_are_no_options(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
