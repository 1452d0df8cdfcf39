"""Answers as they come: whole files, in the order of their making, that a stopped run goes on from.

A folder holds `run.json` (what was asked), `answers/part-00000.jsonl` or `.parquet` and so on, and
`summary.json`. A part is written whole or not at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmcompress.core.errors import ConfigError, ResultsError
from vlmcompress.core.extras import require

FORMATS = ("jsonl", "parquet")
ANSWERS = "answers"
COUNTS = ("tokens_in", "tokens_out", "visual_in", "visual_kept")
"""What is counted of an answer; see `eval_harness.sweep.asker.Answer`."""
#: So long an answer may wait in memory.
_SECONDS = 30.0


def schema() -> Any:
    """Fields of an answer, for Arrow: a batch in which all rows fail has them, too."""
    arrow = require("pyarrow")
    texts = {"id": arrow.string(), "answer": arrow.string()}
    counts = dict.fromkeys(COUNTS, arrow.int64())
    return arrow.schema({"index": arrow.int64(), **texts, **counts, "error": arrow.string()})


class Parts:
    """The answers in a folder; a context manager that writes what is left."""

    def __init__(self, folder: Path, kind: str, rows: int) -> None:
        """Nothing is written yet.

        Args:
            folder: of the run.
            kind: of `FORMATS`.
            rows: of a part at most.

        Raises:
            ConfigError: for another format, or no rows.
        """
        if kind not in FORMATS or rows < 1:
            raise ConfigError(
                f"Parts of {rows} rows in format {kind!r}; allowed are 1 or more rows and "
                f"{' and '.join(FORMATS)}."
            )
        self._home, self._kind, self._rows = folder / ANSWERS, kind, rows
        self._held: list[dict[str, Any]] = []
        self._since = 0.0

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *exc: object) -> None:
        self.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Keep an answer.

        Raises:
            ResultsError: when the disk is full.
        """
        if not self._held:
            self._since = time.monotonic()
        self._held.append(row)
        if len(self._held) >= self._rows or time.monotonic() - self._since > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is held.

        Raises:
            ResultsError: when the disk is full; what was written before stays.
        """
        rows, self._held = self._held, []
        if not rows:
            return
        number = 1 + max((_number(path) for path in self._paths()), default=-1)
        path = self._home / f"part-{number:05d}.{self._kind}"
        draft = path.with_name(f".{path.name}")
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            if self._kind == "jsonl":
                draft.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
            else:
                table = require("pyarrow").Table.from_pylist(rows, schema=schema())
                require("pyarrow.parquet").write_table(table, draft)
            draft.replace(path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise ResultsError(
                f"{str(path)!r} cannot be written: {error}. Earlier parts are kept; make room and "
                "start the run again."
            ) from error

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """All answers that were written, by any run, in whichever format."""
        for path in self._paths():
            if path.suffix == ".jsonl":
                with path.open(encoding="utf-8") as lines:
                    yield from map(json.loads, lines)
            else:
                yield from require("pyarrow.parquet").read_table(path).to_pylist()

    def _paths(self) -> list[Path]:
        found = (path for kind in FORMATS for path in self._home.glob(f"part-*.{kind}"))
        return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.stem.partition("-")[2])
