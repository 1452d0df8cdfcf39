"""Training data: LLaVA's format, broken rows, labels on what the assistant says, in every order."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmcompress.core.errors import ConfigError, DataError
from vlmcompress.reference import load
from vlmcompress.reference.tokenizer import CHAT_TEMPLATE, build_processor
from vlmcompress.training.conversations import Collator, Conversation, Turn, aligned
from vlmcompress.training.data import Rows, Scenes, conversation, rows_of
from vlmcompress.training.distil import IGNORED
from vlmcompress.training.questions import batch_of, encoded

#: Vicuna's way: answers end with a space and no token.
OPEN_ENDED = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    return tmp_path


def said(*turns: str) -> list[dict[str, str]]:
    """Human and assistant in turns."""
    sides = ("human", "gpt")
    return [{"from": sides[i % 2], "value": text} for i, text in enumerate(turns)]


def answers(processor: Any, batch: dict[str, torch.Tensor], row: int = 0) -> str:
    labels = batch["labels"][row]
    assert torch.equal(labels[labels != IGNORED], batch["input_ids"][row][labels != IGNORED])
    return str(processor.tokenizer.decode(labels[labels != IGNORED]))


ONE = {"image": "a.png", "conversations": said("<image>\nWhat colour?", "red")}
TWO = {
    "image": ["a.png", "b.png"],
    "conversations": said("<image> first", "red it is", "then <image>", "blue", "both?", "yes"),
}
NONE = {"conversations": said("How are you?", "well")}


def test_every_turn_of_the_assistant_has_labels(processor: Any, folder: Path) -> None:
    rows = [conversation(row, i, folder) for i, row in enumerate((ONE, TWO, NONE))]
    batch = Collator(processor)(rows)
    end = processor.tokenizer.eos_token
    assert answers(processor, batch, 0) == f" red{end}"
    assert answers(processor, batch, 1) == f" red it is{end} blue{end} yes{end}"
    assert answers(processor, batch, 2) == f" well{end}"
    assert len(batch["pixel_values"]) == 3
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(1).tolist() == [196, 392, 0]
    assert "shown" not in batch


def test_batches_are_those_of_the_other_training() -> None:
    """Which finds the one answer in another way."""
    _, processor = load()
    for step in (0, 3):
        stream = Scenes().stream(4, 6, 2)
        got = Collator(processor)([stream[step * 6 + i] for i in range(6)])
        want = encoded(processor, batch_of(step, 6, 2))
        assert got.keys() - {"shown"} == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
        scenes = [sample.scene_id for sample in batch_of(step, 6, 2)]
        for i, scene in enumerate(scenes):
            assert [got["shown"][j] == got["shown"][i] for j in range(6)] == [
                other == scene for other in scenes
            ]


def test_every_question_about_a_scene_of_its_own() -> None:
    _, processor = load()
    for step in (0, 3):  # of objects, and of texts
        asked = batch_of(step, 40, 2, one_each=True)
        assert len({sample.scene_id for sample in asked}) == 40
        assert len({sample.kind for sample in asked}) == (3 if step else 8)
        stream = Scenes(one_each=True).stream(4, 40, 2)
        batch = Collator(processor)([stream[step * 40 + i] for i in range(40)])
        assert batch["shown"].tolist() == list(range(40))
    other = {sample.scene_id for sample in batch_of(1, 40, 2, one_each=True)}
    assert not other & {sample.scene_id for sample in batch_of(0, 40, 2, one_each=True)}


def test_answers_that_a_template_leaves_open_are_ended(folder: Path) -> None:
    processor = build_processor()
    processor.chat_template = OPEN_ENDED
    batch = Collator(processor)([conversation(TWO, 0, folder)])
    end = processor.tokenizer.eos_token
    assert answers(processor, batch) == f" red it is{end} blue{end} yes{end}"
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.endswith(f"both? ASSISTANT: yes{end} ")


def test_templates_and_processors_that_do_not_do(folder: Path) -> None:
    processor = build_processor()
    processor.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match="Row 0: the chat template"):
        Collator(processor)([conversation(TWO, 0, folder)])
    processor.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        Collator(processor)


def test_placeholders_become_runs() -> None:
    """Of several lengths, with markers, side by side, first and last."""
    image, mark, end = 9, 8, 7
    plain = [1, image, 2, 3, image, image, 4]
    made = [1, mark, image, image, end, 2, 3, image, end, image, image, 4]
    assert aligned(plain, made, image) == [0, -1, 5, 6, -1, -1, 11]
    assert aligned([image, 1], [image, image, 1], image) == [-1, 2]
    assert aligned([1, image], [1, image, mark], image) == [0, -1]
    assert aligned([1, 2], [1, 2], None) == [0, 1]
    assert aligned([1, 2], [1, 3], image) is None
    assert aligned([1, 2], [1, 2, 3], image) is None
    assert aligned([1, image, 2, image, 3], [1, image, image, 3], image) is None
    assert aligned([1, image, 2], [2], image) is None


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"image": "a.png"}, r"Row 5 has no list of `conversations`; its keys are \['image'\]"),
        ({"conversations": []}, "no list"),
        ({"conversations": ["hello"]}, "must be a mapping"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "from 'bot'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "says 3"),
        ({"conversations": said("only a question")}, "nothing to learn"),
        ({"conversations": said("q", " ")}, "empty answer"),
        ({"conversations": said("<image>", "x")}, r"speaks of 1 image\(s\) and brings 0"),
        ({"image": "a.png", "conversations": said("<image><image>", "x")}, "speaks of 2"),
        ({"image": "missing.png", "conversations": said("q", "x")}, r"Row 5: missing\.png cannot"),
        ({"image": "broken.png", "conversations": said("q", "x")}, r"broken\.png cannot be read"),
        ({"image": 3, "conversations": said("q", "x")}, "int, not a path"),
        ({"image": {"bytes": b"nothing"}, "conversations": said("q", "x")}, "cannot be read"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], match: str, folder: Path) -> None:
    with pytest.raises(DataError, match=match) as raised:
        conversation(row, 5, folder)
    assert "Row 5" in str(raised.value)


def test_other_ways_to_write_the_same(folder: Path) -> None:
    want = conversation(ONE, 0, folder)
    data = io.BytesIO()
    want.images[0].save(data, "PNG")
    roles = [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "red"}]
    for image in (want.images[0], {"bytes": data.getvalue()}, {"path": str(folder / "a.png")}):
        got = conversation({"images": [image], "messages": roles}, 0)
        assert got.turns == want.turns
        assert got.images[0].tobytes() == want.images[0].tobytes()


def test_broken_rows_stop_a_run_or_are_left_out(processor: Any, folder: Path) -> None:
    rows = [ONE, {"image": "gone.png", "conversations": said("<image>", "x")}]
    strict = Rows(rows, folder).stream(1, 2, 0)
    with pytest.raises(DataError, match=r"Row 1: gone\.png"):
        list(strict)
    lenient = Rows(rows, folder, "skip").stream(1, 4, 0)
    with pytest.warns(UserWarning, match=r"Row 1: gone\.png .* The row is left out") as warned:
        items = list(lenient)
    assert len(warned) == 1
    assert [item is None for item in items].count(True) == 2
    assert len(Collator(processor)(items)["labels"]) == 2
    with pytest.raises(DataError, match="No row of a batch"):
        Collator(processor)([None, None])
    with pytest.raises(ConfigError, match="'raise' and 'skip'"):
        Rows(rows, folder, "ignore")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no rows"):
        Rows([])


def test_the_order_is_known_from_the_place_alone() -> None:
    rows = [{"conversations": said("q", str(i))} for i in range(7)]

    def order(seed: int, places: range) -> list[int]:
        stream = Rows(rows).stream(5, 7, seed)
        return [item.row for item in map(stream.__getitem__, places) if item is not None]

    whole = order(3, range(35))
    assert [sorted(whole[i : i + 7]) for i in range(0, 35, 7)] == [list(range(7))] * 5
    assert whole[:7] != whole[7:14]
    assert order(3, range(20, 35)) == whole[20:]
    assert order(4, range(35)) != whole
    assert len(Rows(rows).stream(5, 7, 3)) == 35


def test_files(folder: Path, processor: Any) -> None:
    datasets = pytest.importorskip("datasets")
    (folder / "rows.json").write_text(json.dumps([ONE, TWO, NONE]))
    flat = [ONE, {"image": "b.png", "conversations": said("<image> which?", "blue")}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    made = datasets.Dataset.from_list(
        [{**row, "image": str(folder / row["image"])} for row in flat]
    ).cast_column("image", datasets.Image())
    made.to_parquet(str(folder / "rows.parquet"))
    lists = datasets.Dataset.from_list(
        [{"images": [str(folder / "a.png")], "conversations": ONE["conversations"]}]
    ).cast_column("images", datasets.List(datasets.Image()))
    lists.to_parquet(str(folder / "lists.parquet"))
    wanted = {"rows.json": 3, "rows.jsonl": 2, "rows.parquet": 2, "lists.parquet": 1}
    for name, count in wanted.items():
        rows = rows_of(str(folder / name))
        assert len(rows) == count, name
        items = [conversation(rows[i], i, folder) for i in range(count)]
        assert items[0].turns == conversation(ONE, 0, folder).turns
        assert items[0].images[0].getpixel((0, 0)) == (255, 0, 0)
        assert len(Collator(processor)(items)["labels"]) == count


def test_a_broken_picture_inside_a_file_is_met_at_its_row(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    bad = {"bytes": b"broken", "path": None}
    rows = [{"image": bad, "conversations": said("<image>", "x")}]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(
        str(folder / "bad.parquet")
    )
    with pytest.raises(DataError, match="Row 0: the image cannot be read"):
        list(Rows(rows_of(str(folder / "bad.parquet"))).stream(1, 1, 0))


def test_files_that_are_none(folder: Path) -> None:
    for name, text, match in (
        ("a.json", "{", "no valid JSON"),
        ("b.json", "{}", "must hold a list"),
        ("c.jsonl", "{", "cannot be read as training data"),
        ("d.parquet", "x", "cannot be read as training data"),
    ):
        (folder / name).write_text(text)
        with pytest.raises(DataError, match=match):
            rows_of(str(folder / name))
    (folder / "e.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"\.parquet files and hub ids"):
        rows_of(str(folder / "e.csv"))
    with pytest.raises((DataError, ConfigError)):
        rows_of(str(folder / "missing.parquet"))


def test_a_conversation_is_checked_when_it_is_made() -> None:
    with pytest.raises(DataError, match="Row 7 has no turn of the assistant"):
        Conversation((Turn("user", "x"),), row=7)
