"""Files of rows: where they are, how Parquet is opened, and what tells two of them apart.

It imports no torch: processes that read pictures for others start in a moment.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.extras import require

SUFFIXES = (".jsonl", ".parquet")
QUESTIONS = "questions.jsonl"
"""Name of the file that makes a folder a task."""
_FOOTER = 2**16  # bytes at the end of a Parquet file that describe all the rest


def task_files(path: Path) -> list[Path]:
    """Files with the questions of a task; none where it is no task."""
    if path.is_file() and path.suffix in SUFFIXES:
        return [path]
    if (path / QUESTIONS).is_file():
        return [path / QUESTIONS]
    return sorted(path.glob("*.parquet")) if path.is_dir() else []


def open_parquet(file: Path) -> Any:
    """A Parquet file of pyarrow.

    Raises:
        ConfigError: when it is none.
    """
    module = require("pyarrow.parquet")
    try:
        return module.ParquetFile(file)
    except require("pyarrow").ArrowInvalid as error:
        raise ConfigError(f"{str(file)!r} is no Parquet file: {error}") from error


def fingerprint(file: Path) -> str:
    """Of the text of a JSONL file; of size and description of a Parquet file."""
    digest = sha256()
    with file.open("rb") as stream:
        if file.suffix == ".parquet":
            size = file.stat().st_size
            digest.update(str(size).encode())
            stream.seek(max(0, size - _FOOTER))
        for block in iter(lambda: stream.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()[:16]
