"""Keeps every answer as it comes, so that a stopped sweep goes on and two do not mix.

A folder holds `run.json` (what was asked), `samples/TASK/SETTING.jsonl` (one line per sample, in
order) and `results.json`. While a sweep runs, each process appends to files of its own,
`SETTING.N.part`; they are joined when it ends, or when the next one begins. A line is finished or
does not count.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlmcompress.core.errors import ConfigError, ResultsError
from vlmcompress.core.extras import require

RUN, RESULTS, SAMPLES, LOCK = "run.json", "results.json", "samples", ".lock"
_LONGEST = 100  # characters of a label in a file name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this sweep alone; the lock goes with the process.

    Raises:
        ResultsError: when another sweep writes there, or the folder cannot be made.
    """
    filelock = require("filelock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ResultsError(
            f"Another sweep writes to {str(folder)!r}; wait for it or name another folder."
        ) from error
    except OSError as error:
        raise ResultsError(f"{str(folder)!r} cannot be written: {error}.") from error
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all.

    Raises:
        ResultsError: when the disk is full or the file cannot be written; an older one stays.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ResultsError(f"{str(path)!r} cannot be written: {error}.") from error


def claim(folder: Path, run: Mapping[str, Any]) -> None:
    """Note what a folder holds, or check that it holds the same.

    Args:
        folder: locked.
        run: `common`, `tasks` and `settings`, JSON-ready. New tasks and settings may come in.

    Raises:
        ConfigError: when something differs that its answers depend on, or the folder holds other
            files than a sweep's.
    """
    file = folder / RUN
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / SAMPLES).exists():
            raise ConfigError(
                f"{str(folder)!r} has samples and no {RUN}; name another folder."
            ) from None
        kept = {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{str(file)!r} is damaged ({error}); name another folder.") from error
    joined = {}
    for part in ("common", "tasks", "settings"):
        new, old = json.loads(json.dumps(run[part])), kept.get(part, {})
        for name in new.keys() & old.keys():
            if new[name] != old[name]:
                raise ConfigError(
                    f"{str(folder)!r} was made with {name} = {old[name]!r}, and this sweep has "
                    f"{new[name]!r}; name another folder, or forget the old answers with --fresh."
                )
        joined[part] = {**old, **new}
    write_json(file, joined)


def forget(folder: Path) -> None:
    """Delete what a sweep left in a folder, and nothing else."""
    if not (folder / RUN).exists():
        return
    shutil.rmtree(folder / SAMPLES, ignore_errors=True)
    for name in (RESULTS, RUN):
        (folder / name).unlink(missing_ok=True)


@dataclass
class Answers:
    """The lines of one setting of one task.

    Attributes:
        file: where they end up, in order of their index.
        part: where this process appends; opened with the first line.
    """

    file: Path
    part: Path
    _open: int | None = field(default=None, repr=False)

    @classmethod
    def of(cls, folder: Path, task: str, label: str, part: int) -> Answers:
        """The lines of a setting.

        Args:
            folder: of the sweep.
            task: name of the task.
            label: of the setting.
            part: number of this process's part (`next_part` and the process's rank).
        """
        home = folder / SAMPLES / _file_name(task)
        name = _file_name(label)
        return cls(home / f"{name}.jsonl", home / f"{name}.{part:04d}.part")

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add lines, all or none of them.

        Raises:
            ResultsError: when the disk is full or the file cannot be written; what was there stays.
        """
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            if self._open is None:
                self.part.parent.mkdir(parents=True, exist_ok=True)
                self._open = os.open(self.part, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
            _write(self._open, data)
        except OSError as error:
            raise ResultsError(
                f"{str(self.part)!r} cannot be written: {error}. Answers up to here are kept; make "
                "room and start the sweep again."
            ) from error

    def close(self) -> None:
        """Close the part."""
        if self._open is not None:
            os.close(self._open)
            self._open = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """All finished lines in order of their index, each index once."""
        last = None
        for row in heapq.merge(*map(_lines, self._sources()), key=lambda row: row["index"]):
            if row["index"] != last:
                yield row
            last = row["index"]

    def done(self) -> bytearray:
        """[index] 1 where a line is finished."""
        found = bytearray()
        for row in self.rows():
            found.extend(bytes(row["index"] + 1 - len(found)))
            found[row["index"]] = 1
        return found

    def join(self) -> None:
        """Join all parts into the file.

        Raises:
            ResultsError: when the disk is full; the parts stay.
        """
        sources = self._sources()
        if sources in ([], [self.file]):
            return
        draft = self.file.with_suffix(".tmp")
        try:
            with draft.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in self.rows())
            draft.replace(self.file)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise ResultsError(f"{str(self.file)!r} cannot be written: {error}.") from error
        for source in sources:
            if source != self.file:
                source.unlink()

    def _sources(self) -> list[Path]:
        whole = [self.file] if self.file.exists() else []
        stem = self.file.name.removesuffix(".jsonl")
        return whole + sorted(self.file.parent.glob(f"{stem}.[0-9][0-9][0-9][0-9].part"))


def next_part(folder: Path) -> int:
    """A number above those of all parts in a folder."""
    parts = (folder / SAMPLES).glob("*/*.part")
    return 1 + max((int(part.name.split(".")[-2]) for part in parts), default=-1)


def _write(file: int, data: bytes) -> None:
    """Write all of it, or leave the file as it was."""
    start = os.fstat(file).st_size
    try:
        while data:
            data = data[os.write(file, data) :]
    except BaseException:  # an interrupt too must leave whole lines
        os.ftruncate(file, start)
        raise


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Finished lines; one that a power cut tore is none."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("index"), int):
                yield row


def _file_name(label: str) -> str:
    """A label as a file is named: as it is where that is safe, otherwise with a hash of it."""
    plain = label.replace(":", "@")
    safe = re.sub(r"[^A-Za-z0-9_.@-]+", "-", plain).strip("-.")
    return safe if safe == plain and len(safe) < _LONGEST else f"{safe[:60]}-{_hash(label)}"


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]
