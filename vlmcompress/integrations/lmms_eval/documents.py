"""Questions of `vlmcompress eval run` as lmms-eval's documents, and back."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL.Image import Image

from eval_harness.sweep.metrics import metric_of
from eval_harness.sweep.questions import Picture, Question
from eval_harness.sweep.tasks import Task
from vlmcompress.core.errors import DataError


def documents(task: Task) -> Iterator[dict[str, Any]]:
    """One document per question.

    Pictures that were drawn are stored without loss, files by their place. lmms-eval keeps what
    stands under `bytes` out of its samples files.

    Raises:
        DataError: for a row that cannot be asked: lmms-eval knows no failed samples.
    """
    for question in task.questions():
        if question.error:
            raise DataError(f"Task {task.name!r} cannot be asked: {question.error}.")
        stored = [_stored(picture) for picture in question.pictures]
        yield {
            "id": question.id,
            "prompt": task.prompt(question),
            "pictures": {"bytes": [s[0] for s in stored], "path": [s[1] for s in stored]},
            "answers": list(question.answers),
            "options": list(question.options),
            "metric": question.metric,
            "image_id": question.image_id,
            "kind": question.kind,
        }


def _stored(picture: Picture) -> tuple[bytes, str]:
    """The bytes of a picture, or none and its place."""
    if isinstance(picture.source, Path):
        return b"", str(picture.source.absolute())
    if isinstance(picture.source, bytes):
        return picture.source, ""
    out = io.BytesIO()
    picture.source.save(out, format="PNG")
    return out.getvalue(), ""


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image]:
    """The pictures in RGB, upright.

    Raises:
        UnsupportedInputError: for one that cannot be read.
    """
    stored = doc["pictures"]
    return [
        Picture.of(held or place, Path()).open()
        for held, place in zip(stored["bytes"], stored["path"], strict=True)
    ]


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """What is asked."""
    return str(doc["prompt"])


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """The first accepted answer."""
    return str(doc["answers"][0])


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """The score of an answer, by the question's own metric."""
    question = Question(
        id=doc["id"],
        answers=tuple(doc["answers"]),
        options=tuple(doc["options"]),
        metric=doc["metric"],
    )
    return {"score": metric_of(question.metric).score(results[0].strip(), question)}
