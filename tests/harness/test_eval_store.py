"""Answers on disk: whole lines, one sweep per folder, nothing mixed and nothing torn."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest

from eval_harness.sweep import store
from eval_harness.sweep.store import Answers
from vlmcompress.core.errors import ConfigError, ResultsError

RUN = {
    "common": {"model": "m", "batch": 4},
    "tasks": {"t": {"n": 1}},
    "settings": {"full": ["", 1]},
}


def _rows(*indices):
    return [{"index": i, "text": f"answer {i}"} for i in indices]


def _indices(answers):
    return [row["index"] for row in answers.rows()]


@contextmanager
def _full_disk(room):
    """Files cannot grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_parts_of_several_processes_are_joined_in_order(tmp_path):
    first, second = (Answers.of(tmp_path, "task", "divprune:0.1", part) for part in (0, 1))
    first.append(_rows(0, 1))
    second.append(_rows(2, 3))
    first.append(_rows(4))
    assert _indices(first) == [0, 1, 2, 3, 4]
    assert store.next_part(tmp_path) == 2
    first.join()
    for answers in (first, second):
        answers.close()
    home = tmp_path / "samples" / "task"
    assert [path.name for path in home.iterdir()] == ["divprune@0.1.jsonl"]
    lines = (home / "divprune@0.1.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == _rows(0, 1, 2, 3, 4)
    assert store.next_part(tmp_path) == 0


def test_a_torn_line_does_not_count(tmp_path):
    answers = Answers.of(tmp_path, "task", "full", 0)
    answers.append(_rows(0, 1, 2))
    answers.close()
    content = answers.part.read_bytes()
    answers.part.write_bytes(content[:-5])
    assert list(answers.done()) == [1, 1]
    later = Answers.of(tmp_path, "task", "full", store.next_part(tmp_path))
    later.append(_rows(2, 3))
    later.close()
    assert _indices(later) == [0, 1, 2, 3]
    later.join()
    assert later.file.read_text(encoding="utf-8").count("\n") == 4


def test_gaps_are_found(tmp_path):
    answers = Answers.of(tmp_path, "task", "full", 0)
    assert answers.done() == b""
    answers.append(_rows(0, 3))
    assert list(answers.done()) == [1, 0, 0, 1]
    answers.close()


def test_an_index_counts_once(tmp_path):
    """A sweep that was stopped between joining and deleting its parts has both."""
    answers = Answers.of(tmp_path, "task", "full", 0)
    answers.append(_rows(0, 1))
    answers.close()
    answers.file.write_bytes(answers.part.read_bytes())
    assert _indices(answers) == [0, 1]


def test_a_full_disk_keeps_what_was_there(tmp_path):
    answers = Answers.of(tmp_path, "task", "full", 0)
    answers.append(_rows(0, 1))
    before = answers.part.read_bytes()
    with (
        _full_disk(len(before) + 40),
        pytest.raises(ResultsError, match=r"cannot be written: .*; make room"),
    ):
        answers.append(_rows(*range(2, 60)))
    assert answers.part.read_bytes() == before
    answers.append(_rows(2))  # and there is room again
    assert _indices(answers) == [0, 1, 2]
    with _full_disk(10), pytest.raises(ResultsError, match="cannot be written"):
        Answers.of(tmp_path, "task", "full", 1).join()
    answers.close()
    assert _indices(answers) == [0, 1, 2]
    assert not answers.file.exists()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "results.json"
    store.write_json(path, {"a": 1})
    with _full_disk(10), pytest.raises(ResultsError, match=r"results.json' cannot be written"):
        store.write_json(path, {"a": list(range(100))})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [*path.parent.iterdir()] == [path]


def test_a_folder_is_locked_for_other_processes(tmp_path):
    code = (
        "import sys; from pathlib import Path; from eval_harness.sweep.store import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ResultsError, match="Another sweep writes to"), store.locked(tmp_path):
            pass
        other.kill()
    with store.locked(tmp_path):  # a killed process holds nothing
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with (
        pytest.raises(ResultsError, match="cannot be written"),
        store.locked(tmp_path / "file" / "x"),
    ):
        pass


def test_more_tasks_and_settings_may_come_in(tmp_path):
    store.claim(tmp_path, RUN)
    more = {
        **RUN,
        "tasks": {"u": {"n": 2}},
        "settings": {"full": ["", 1], "divprune:0.1": ["ab", 1]},
    }
    store.claim(tmp_path, more)
    kept = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert kept["tasks"] == {"t": {"n": 1}, "u": {"n": 2}}
    assert set(kept["settings"]) == {"full", "divprune:0.1"}


@pytest.mark.parametrize(
    ("part", "changed", "name"),
    [
        ("common", {"model": "m", "batch": 5}, "batch = 4"),
        ("tasks", {"t": {"n": 2}}, "t = "),
        ("settings", {"full": ["", 2]}, "full = "),
    ],
)
def test_answers_to_something_else_are_not_mixed_in(tmp_path, part, changed, name):
    store.claim(tmp_path, RUN)
    with pytest.raises(ConfigError, match=f"was made with {name}.*--fresh"):
        store.claim(tmp_path, {**RUN, part: changed})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == RUN


def test_forgetting_deletes_nothing_else(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine.txt").write_text("x", encoding="utf-8")
    store.forget(tmp_path)  # no sweep was here
    assert (tmp_path / "samples" / "mine.txt").exists()
    with pytest.raises(ConfigError, match=r"has samples and no run.json"):
        store.claim(tmp_path, RUN)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="is damaged"):
        store.claim(tmp_path, RUN)
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    store.forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("divprune:0.1", "divprune@0.1"),
        ("full", "full"),
        ("random:0.1.run2", "random@0.1.run2"),
    ],
)
def test_plain_labels_name_their_files(tmp_path, label, name):
    assert Answers.of(tmp_path, "t", label, 0).file.stem == name


def test_labels_that_no_file_may_have_are_told_apart(tmp_path):
    labels = ["a:0.5 | b", "a:0.5 / b", "../a", "A" * 300, "A" * 301, ".", "vtc(x='y')"]
    files = {Answers.of(tmp_path, "t", label, 0).file for label in labels}
    assert len(files) == len(labels)
    assert all(file.parent == tmp_path / "samples" / "t" for file in files)
    assert all(len(file.name) < 120 for file in files)
