"""`vlmcompress batch`: rows of folders and files, answers in parts, actors, and Ray itself."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.hub.adapters import PEFT_WARNING, with_lora
from vlmcompress import hub, patch
from vlmcompress.cli import app
from vlmcompress.core.errors import (
    ConfigError,
    MissingExtraError,
    ResultsError,
    UnknownMethodError,
)
from vlmcompress.integrations import ray as batches
from vlmcompress.integrations import sources
from vlmcompress.integrations.actor import Actor, checked
from vlmcompress.integrations.parts import Parts, schema
from vlmcompress.integrations.ray import BatchPlan, Cluster
from vlmcompress.reference import load, prompt, samples

COUNTS = {"tokens_in": 9, "tokens_out": 2, "visual_in": 196, "visual_kept": 20}


def answer(index: int, **more: Any) -> dict[str, Any]:
    """A row of answers."""
    return {"index": index, "id": str(index), "answer": "a", **COUNTS, "error": None, **more}


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(file, "png")
    return file.getvalue()


def read(path: Path, question: str | None = None) -> list[dict[str, Any]]:
    """All rows of a source, chunk by chunk."""
    chunks = sources.open_source(path).chunks
    return [row for chunk in chunks for row in sources.read(vars(chunk), question)]


# Sources


def test_rows_of_a_file_are_cut_in_chunks_and_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    row = {"image": "a.png", "question": "What?"}
    lines = [json.dumps({**row, "id": f"row {i}"}) for i in range(150)]
    lines[70] = "no json"
    (tmp_path / "q.jsonl").write_text("\n\n".join(["", *lines, ""]))  # empty lines are no rows
    found = sources.open_source(tmp_path / "q.jsonl")
    assert [(chunk.first, chunk.count) for chunk in found.chunks] == [(0, 64), (64, 64), (128, 22)]
    rows = read(tmp_path / "q.jsonl")
    assert [row["index"] for row in rows] == list(range(150))
    assert [row["id"] for row in rows if not row["error"]] == [
        f"row {i}" for i in range(150) if i != 70
    ]
    assert "no JSON" in rows[70]["error"]
    assert rows[149]["pictures"] == [png()]
    second = {**vars(found.chunks[1]), "done": [64, 70, 127]}
    assert [row["index"] for row in sources.read(second, None)] == [*range(65, 70), *range(71, 127)]


def test_rows_of_parquet_files(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    shown = [{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}]
    rows = [{"images": shown[: 1 + i % 2], "question": f"{i}?"} for i in range(5)]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=5)
    chunks = sources.open_source(tmp_path).chunks
    assert [(c.start, c.first, c.count) for c in chunks] == [
        (0, 0, 2),
        (1, 2, 2),
        (2, 4, 1),
        (0, 5, 5),
    ]
    found = read(tmp_path)
    assert [row["question"] for row in found] == [f"{i}?" for i in range(5)] * 2
    assert [len(row["pictures"]) for row in found[:3]] == [1, 2, 1]
    assert found[1]["pictures"][1] == png("blue")


def test_pictures_of_a_folder_are_asked_one_question(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.png", "inside/c.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    rows = read(tmp_path, "What is this?")
    assert [row["id"] for row in rows] == ["a.png", "b.PNG", "inside/c.jpg"]
    assert {row["question"] for row in rows} == {"What is this?"}
    assert all("it has no 'question'" in row["error"] for row in read(tmp_path))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": "What?"}, "it has no 'image'"),
        ({"image": "gone.png", "question": "What?"}, "'gone.png' cannot be read"),
        ({"image": 3, "question": "What?"}, "an image is 3"),
        ([], "no JSON object"),
    ],
)
def test_a_row_that_cannot_be_asked_says_why(tmp_path: Path, row: Any, why: str) -> None:
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    assert why in read(tmp_path)[0]["error"]


def test_sources_with_nothing_to_ask(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "q.csv"):
        with pytest.raises(ConfigError, match="holds nothing to ask"):
            sources.open_source(path)


# Parts


def test_parts_are_whole_files_of_either_format(tmp_path: Path) -> None:
    for kind, first in (("jsonl", 0), ("parquet", 7)):
        with Parts(tmp_path, kind, 3) as parts:
            for index in range(first, first + 7):
                parts.add(answer(index))
    home = tmp_path / "answers"
    assert sorted(path.name for path in home.iterdir()) == [
        *(f"part-0000{i}.jsonl" for i in range(3)),
        *(f"part-0000{i}.parquet" for i in range(3, 6)),
    ]
    assert list(Parts(tmp_path, "jsonl", 1).rows()) == [answer(index) for index in range(14)]
    for kind, rows in (("csv", 3), ("jsonl", 0)):
        with pytest.raises(ConfigError, match="allowed are 1 or more rows and jsonl and parquet"):
            Parts(tmp_path, kind, rows)


def test_a_full_disk_leaves_earlier_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(tmp_path, "jsonl", 1)
    parts.add(answer(0))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResultsError, match="No space left"):
        parts.add(answer(1))
    assert list(parts.rows()) == [answer(0)]


# Actors


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions about drawn scenes, the fourth with a broken picture."""
    folder = tmp_path_factory.mktemp("asked")
    rows = []
    for number, sample in enumerate(samples("test", 10)):
        sample.image.save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": sample.question})
    (folder / "3.png").write_bytes(png()[:40])
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


PLAN = BatchPlan(method="vtc_cls", keep=0.1, new_tokens=4, batch=3)


@pytest.fixture(scope="module")
def want(asked: Path) -> list[str | None]:
    """Answers of a patched model, one call for each question."""
    model, processor = load()
    told: list[str | None] = []
    with patch(model, "vtc_cls", keep=0.1):
        for number, sample in enumerate(samples("test", 10)):
            text = prompt(processor, sample.question)
            batch = processor(text=text, images=sample.image, return_tensors="pt")
            ids = model.generate(**batch, max_new_tokens=4, do_sample=False)
            new = ids[0, batch["input_ids"].shape[1] :]
            told.append(None if number == 3 else processor.decode(new, True).strip())
    return told


def test_an_actor_answers_as_a_patched_model_does(asked: Path, want: list[str | None]) -> None:
    import pyarrow as pa

    table = Actor(PLAN, "cpu")(pa.Table.from_pylist(read(asked)))
    assert table.schema == schema()
    rows = table.to_pylist()
    assert [row["answer"] for row in rows] == want
    assert rows[3]["error"].startswith("image '3.png' cannot be read")
    assert {(row["visual_in"], row["visual_kept"]) for row in rows if row["answer"]} == {(196, 20)}


@pytest.mark.parametrize(("keep", "kept"), [(None, 196), (0.5, 98)])
def test_without_a_method(asked: Path, keep: float | None, kept: int) -> None:
    import pyarrow as pa

    table = Actor(BatchPlan(keep=keep, new_tokens=2), "cpu")(pa.Table.from_pylist(read(asked)[:2]))
    assert table.column("visual_kept").to_pylist() == [kept] * 2


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_under_an_adapter(asked: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    model, processor = load()
    folder = tmp_path / "tenth"
    with patch(with_lora(model), "vtc_cls", keep=0.1) as handle:
        hub.save(handle, folder, trained_keep=(0.05, 0.1))
        rows = read(asked)[:2]
        want = []
        for row in rows:
            image = Image.open(io.BytesIO(row["pictures"][0])).convert("RGB")
            text = prompt(processor, row["question"])
            inputs = processor(text=text, images=image, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :]
            want.append(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
    plan = BatchPlan(adapter=str(folder), new_tokens=4)
    table = Actor(plan, "cpu")(pa.Table.from_pylist(rows))
    assert table.column("answer").to_pylist() == want
    assert table.column("visual_kept").to_pylist() == [20] * 2
    assert plan.identity()["source"] != BatchPlan(new_tokens=4).identity()["source"]

    outside = Actor(BatchPlan(adapter=str(folder), keep=0.5), "cpu")
    told = outside(pa.Table.from_pylist(rows)).to_pylist()
    with pytest.raises(ConfigError, match="was trained for"):
        list(checked(told))
    with pytest.raises(ConfigError, match="brings its own"):
        BatchPlan(adapter=str(folder), method="divprune", keep=0.1)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (BatchPlan(model="no/such folder"), "cannot be loaded"),
        (BatchPlan(method="cdpruner", keep=0.1), "clip="),
    ],
)
def test_what_no_row_can_be_asked_with_stops_the_run(asked: Path, plan: Any, why: str) -> None:
    import pyarrow as pa

    told = Actor(plan, "cpu")(pa.Table.from_pylist(read(asked)[:2])).to_pylist()
    with pytest.raises(ConfigError, match=why):
        list(checked([answer(7), *told]))


def test_plans_that_make_no_sense() -> None:
    with pytest.raises(UnknownMethodError, match="Did you mean 'divprune'"):
        BatchPlan(method="divprun", keep=0.1)
    for options in ({"keep": 1.5}, {"method": "divprune"}, {"batch": 0}, {"new_tokens": 0}):
        with pytest.raises(ConfigError):
            BatchPlan(**options)
    for options in ({"actors": 0}, {"cpus": 0}, {"gpus": -1}):
        with pytest.raises(ConfigError, match="allowed are 1 or more actors"):
            Cluster(**options)


# Ray


def test_a_missing_ray_names_its_extra(asked: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"vlmcompress\[ray\]"):
        batches.run(asked, tmp_path, PLAN)


@pytest.mark.slow
def test_two_actors_finish_what_was_begun(
    asked: Path, want: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were answered are left out, a broken picture fails alone, and then all is done."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # otherwise they wait for all other tests
    words = ["batch", str(asked), "--out", str(tmp_path), "--method", "vtc_cls", "--keep", "0.1"]
    words += ["--new-tokens", "4", "--batch", "3", "--actors", "2", "--device", "cpu", "--json"]
    words += ["--format", "parquet", "--part-rows", "4"]
    with Parts(tmp_path, "jsonl", 10) as before:
        before.add(answer(5, answer="as it was"))
    done = CliRunner().invoke(app, words)
    logging.getLogger("ray.data").setLevel(logging.NOTSET)
    assert done.exit_code == 3, done.output
    assert "1 rows failed" in done.stderr
    told = json.loads(done.stdout)
    assert (told["rows"], told["asked"], told["answered"], told["failed"]) == (10, 9, 9, 1)
    rows = sorted(Parts(tmp_path, "jsonl", 1).rows(), key=lambda row: row["index"])
    assert [row["index"] for row in rows] == list(range(10))
    assert [row["answer"] for row in rows] == [*want[:5], "as it was", *want[6:]]
    assert "3.png" in rows[3]["error"]
    assert len(list((tmp_path / "answers").glob("*.parquet"))) == 3
    assert not ray.is_initialized()
    # Nothing is left to do, so that Ray does not start.
    monkeypatch.setattr(batches, "started", None)
    again = CliRunner().invoke(app, words)
    assert json.loads(again.stdout) == {**told, "asked": 0, "seconds": 0.0}
    other = CliRunner().invoke(app, [*words, "--keep", "0.2"])
    assert other.exit_code == 1
    assert "was made with keep = 0.1" in other.output
