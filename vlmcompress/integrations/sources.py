"""What a batch run asks: pictures of a folder, or rows of JSONL and Parquet files, cut in chunks.

A chunk says where rows stand and not what they are, so that any machine can read it. What is
imported here is little: tasks that read start in a moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from eval_harness.sweep.files import fingerprint, open_parquet, task_files
from eval_harness.sweep.questions import Picture
from vlmcompress.core.errors import ConfigError, UnsupportedInputError
from vlmcompress.core.extras import require

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CHUNK = 64
"""Rows of a chunk, but for Parquet files, whose row groups are chunks."""


@dataclass(frozen=True)
class Chunk:
    """Rows that are read together.

    Attributes:
        file: that they stand in; the folder, for pictures.
        first: number of the first row among all rows of the source.
        count: of rows.
        start: where they begin: a byte of a JSONL file, a row group of a Parquet file.
        names: of pictures in a folder.
        done: numbers of rows that are not to be read any more.
    """

    file: str
    first: int
    count: int
    start: int = 0
    names: tuple[str, ...] = ()
    done: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """A question, ready to be sent to where it is asked.

    Attributes:
        index: number of the row among all rows of the source.
        id: its name.
        question: text; empty where there is an error.
        pictures: files as bytes, in the order of the prompt.
        names: of the pictures, for messages.
        error: why it cannot be asked; empty if it can.
    """

    index: int
    id: str
    question: str = ""
    pictures: tuple[bytes, ...] = ()
    names: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Source:
    """All rows of a run.

    Attributes:
        chunks: in their order.
        identity: JSON-ready, changes with the contents.
    """

    chunks: tuple[Chunk, ...]
    identity: dict[str, Any]

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(chunk.count for chunk in self.chunks)


def open_source(path: str | Path) -> Source:
    """Where the rows of a folder or a file stand.

    Args:
        path: a JSONL or Parquet file, a folder with `questions.jsonl` or Parquet files, or one with
            pictures (those of its subfolders too).

    Raises:
        ConfigError: for anything else, and where nothing is in it.
    """
    path = Path(path)
    files = task_files(path)
    if files:
        chunks: list[Chunk] = []
        for file in files:
            first = sum(chunk.count for chunk in chunks)
            chunks += (_row_groups if file.suffix == ".parquet" else _lines)(file, first)
        identity = {file.name: fingerprint(file) for file in files}
    else:
        names = sorted(
            file.relative_to(path).as_posix()
            for file in (path.rglob("*") if path.is_dir() else ())
            if file.suffix.lower() in PICTURES
        )
        chunks = [
            Chunk(str(path), first, len(some), names=tuple(some))
            for first in range(0, len(names), CHUNK)
            for some in [names[first : first + CHUNK]]
        ]
        identity = {"pictures": sha256("\n".join(names).encode()).hexdigest()[:16]}
    if not sum(chunk.count for chunk in chunks):
        raise ConfigError(
            f"{str(path)!r} holds nothing to ask. Allowed are JSONL and Parquet files, folders "
            "with questions.jsonl or Parquet files, and folders of pictures "
            f"({', '.join(PICTURES)})."
        )
    return Source(tuple(chunks), identity)


def read(item: Mapping[str, Any], question: str | None) -> list[dict[str, Any]]:
    """The rows of a chunk that are to be asked, with their pictures.

    Args:
        item: the fields of a `Chunk`, as Ray carries them.
        question: of rows that bring none.

    Returns:
        The fields of a `Row` each.
    """
    lists = {name: tuple(item[name]) for name in ("names", "done")}
    chunk = Chunk(**{**item, **lists})
    rows = enumerate(_raw(chunk), start=chunk.first)
    found = [_row(row, i, chunk, question) for i, row in rows if i not in lists["done"]]
    return [{**asdict(row), "pictures": [*row.pictures], "names": [*row.names]} for row in found]


def _row(row: Mapping[str, Any] | str, index: int, chunk: Chunk, question: str | None) -> Row:
    """A row with its pictures, or with why it cannot be asked; `row` may say that itself."""
    if isinstance(row, str):
        return Row(index, str(index), error=row)
    folder = Path(chunk.file) if chunk.names else Path(chunk.file).parent
    name = str(row.get("id", index))
    try:
        asked = row.get("question") or question
        if not isinstance(asked, str) or not asked.strip():
            raise ConfigError("it has no 'question', and none is given for all")
        shown = row.get("images") if row.get("images") is not None else row.get("image")
        listed = shown if isinstance(shown, list | tuple) else [shown]
        if shown is None or not listed:
            raise ConfigError("it has no 'image' (or 'images')")
        pictures = [Picture.of(one, folder) for one in listed]
        files = tuple(map(_bytes, pictures))
    except (ConfigError, UnsupportedInputError) as error:
        return Row(index, name, error=f"row {index}: {error}")
    return Row(index, name, asked, files, tuple(picture.key for picture in pictures))


def _bytes(picture: Picture) -> bytes:
    if isinstance(picture.source, bytes):
        return picture.source
    try:
        return Path(str(picture.source)).read_bytes()
    except OSError as error:
        raise UnsupportedInputError(f"image {picture.key!r} cannot be read: {error}") from error


def _raw(chunk: Chunk) -> Iterator[Mapping[str, Any] | str]:
    """Rows as they stand there, or why one cannot be read."""
    if chunk.names:
        yield from ({"id": name, "image": name} for name in chunk.names)
    elif chunk.file.endswith(".parquet"):
        with open_parquet(Path(chunk.file)) as table:
            yield from table.read_row_group(chunk.start).to_pylist()
    else:
        with Path(chunk.file).open("rb") as lines:
            lines.seek(chunk.start)
            yield from map(_parsed, islice(filter(bytes.strip, lines), chunk.count))


def _parsed(line: bytes) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"the line is no JSON: {error}"
    return row if isinstance(row, dict) else "the line is no JSON object"


def _row_groups(file: Path, first: int) -> list[Chunk]:
    require("pyarrow")
    chunks = []
    with open_parquet(file) as table:
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            chunks.append(Chunk(str(file), first, count, start=group))
            first += count
    return chunks


def _lines(file: Path, first: int) -> list[Chunk]:
    chunks: list[Chunk] = []
    count, start, place = 0, 0, 0
    with file.open("rb") as lines:
        for line in lines:
            start = place if not count else start
            place += len(line)
            count += bool(line.strip())
            if count == CHUNK:
                chunks.append(Chunk(str(file), first, count, start))
                first, count = first + count, 0
    return [*chunks, Chunk(str(file), first, count, start)] if count else chunks
