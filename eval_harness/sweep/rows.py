"""Rows of files as questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_harness.sweep.metrics import metric_of
from eval_harness.sweep.questions import Picture, Question
from vlmcompress.core.errors import ConfigError


def question_of(row: Mapping[str, Any], number: int, folder: Path, metric: str) -> Question:
    """A question from a row of a file; the schema stands in docs/evaluating.md.

    Args:
        row: its fields.
        number: of the row; its id where it has none.
        folder: that paths of pictures are relative to.
        metric: of rows that name none.

    Returns:
        The question; one with `error` where the row cannot be asked.
    """
    name = str(row.get("id", number))
    try:
        return _read(row, name, folder, metric)
    except ConfigError as error:
        return Question(name, image_id=name, error=f"row {number}: {error}")


def _read(row: Mapping[str, Any], name: str, folder: Path, metric: str) -> Question:
    pictures = tuple(Picture.of(value, folder) for value in _listed(row, "images", "image"))
    found = Question(
        id=name,
        pictures=pictures,
        question=_text(row, "question"),
        answers=tuple(str(value) for value in _listed(row, "answers", "answer")),
        options=tuple(str(value) for value in _maybe(row.get("options"))),
        metric=row.get("metric") or metric,
        image_id=str(row.get("image_id") or "+".join(picture.key for picture in pictures)),
        kind=str(row.get("kind") or ""),
    )
    metric_of(found.metric).check(found)
    return found


def _listed(row: Mapping[str, Any], many: str, one: str) -> Sequence[Any]:
    """The values of a field that may stand in the plural or in the singular."""
    values = _maybe(row.get(many) if row.get(many) is not None else row.get(one))
    if not values or any(value is None for value in values):
        raise ConfigError(f"it has no {one!r} (or {many!r})")
    return values


def _maybe(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"its {field!r} is {value!r}; it must be a text")
    return value
