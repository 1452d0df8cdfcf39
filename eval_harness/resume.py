"""Long measurements in parts: each finished part is kept, and a stopped measurement goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Part:
    """Something that is measured apart from everything else.

    Attributes:
        name: of its file, unique within a measurement.
        identity: JSON-ready, whatever the result depends on; a kept result of another identity is
            measured again.
        work: a function of a module (processes import it); returns what is JSON-ready.
        arguments: of `work`.
    """

    name: str
    identity: Any
    work: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


def measured(
    parts: Sequence[Part],
    folder: str | Path,
    *,
    processes: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The results of all parts, those kept in the folder and those that are left.

    Args:
        parts: what is wanted.
        folder: where each finished part is kept; made when missing.
        processes: one-thread processes; 0 works in this one, with the threads it has.
        progress: called with the name of each part that is there, kept ones first.

    Returns:
        {name of the part: its result}, in the order of `parts`.

    Raises:
        Exception: the first that a part raised, once all others are measured and kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = {part.name: kept for part in parts for kept in _kept(folder, part)}
    say = progress or (lambda name: None)
    for name in found:
        say(name)
    left = [part for part in parts if part.name not in found]
    for part, result in computed(left, processes):
        found[part.name] = _keep(folder, part, result)
        say(part.name)
    return {part.name: found[part.name] for part in parts}


def computed(parts: Sequence[Part], processes: int) -> Iterator[tuple[Part, Any]]:
    """Measure parts and yield them as they are done; an error is raised after all others.

    What interrupts the caller drops the parts that have not begun.
    """
    errors: list[Exception] = []
    for part, done in _futures(parts, processes) if processes else _here(parts):
        try:
            result = done()
        except Exception as error:
            errors.append(error)
        else:
            yield part, result
    if errors:
        raise errors[0]


def _here(parts: Sequence[Part]) -> Iterator[tuple[Part, Callable[[], Any]]]:
    for part in parts:
        yield part, partial(part.work, *part.arguments)


def _futures(parts: Sequence[Part], processes: int) -> Iterator[tuple[Part, Callable[[], Any]]]:
    if not parts:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(parts)), mp_context=context) as pool:
        running = {pool.submit(part.work, *part.arguments): part for part in parts}
        try:
            for done in as_completed(running):
                yield running[done], done.result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _kept(folder: Path, part: Part) -> list[Any]:
    """The kept result, if it still holds; damaged files are measured again."""
    try:
        stored = json.loads(_file(folder, part).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return []
    return [stored["result"]] if stored["identity"] == _plain(part.identity) else []


def _keep(folder: Path, part: Part, result: Any) -> Any:
    """Write a result, whole or not at all, and return it as it will be read."""
    text = json.dumps({"identity": part.identity, "result": result})
    draft = _file(folder, part).with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(_file(folder, part))
    return _plain(result)


def _file(folder: Path, part: Part) -> Path:
    return folder / f"{part.name}.json"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
