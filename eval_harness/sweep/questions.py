"""A question about pictures, and pictures that are opened when they are needed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vlmcompress.core.errors import ConfigError, UnsupportedInputError


@dataclass(frozen=True)
class Picture:
    """A picture that is not opened yet.

    Attributes:
        source: a file, the bytes of one, or an open picture.
        key: pictures of one key show the same.
    """

    source: Path | bytes | Image.Image
    key: str

    @classmethod
    def of(cls, value: Any, folder: Path) -> Picture:
        """From a field of a row.

        Args:
            value: a path, bytes, or a mapping with `bytes` or `path` (as Hugging Face datasets
                store pictures).
            folder: that paths are relative to.

        Raises:
            ConfigError: for anything else.
        """
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return cls(value, sha256(value).hexdigest()[:16])
        if isinstance(value, str) and value:
            return cls(folder / value, value)
        raise ConfigError(
            f"an image is {value!r}; allowed are a path, bytes, and a mapping with one of both"
        )

    def open(self) -> Image.Image:
        """The picture in RGB, upright.

        Raises:
            UnsupportedInputError: when it is missing, damaged, or larger than Pillow opens.
        """
        if isinstance(self.source, Image.Image):
            return self.source.convert("RGB")
        source = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        try:
            with Image.open(source) as found:
                # A new picture in any case: the file is closed behind it.
                return ImageOps.exif_transpose(found).convert("RGB")
        # Damaged files raise whatever their decoder meets.
        except Exception as error:
            raise UnsupportedInputError(f"image {self.key!r} cannot be read: {error}") from error


@dataclass(frozen=True)
class Question:
    """One sample of a task.

    Attributes:
        id: its name.
        pictures: that it is about, in the order of the prompt.
        question: as the task words it.
        answers: accepted ones, or one of each annotator.
        options: of a multiple choice.
        metric: how an answer is scored.
        image_id: questions of one are drawn together when intervals are estimated.
        kind: for tables by kind; may be empty.
        error: why the row cannot be asked; empty if it can.
    """

    id: str
    pictures: tuple[Picture, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    metric: str = ""
    image_id: str = ""
    kind: str = ""
    error: str = ""

    def prompt(self, template: str) -> str:
        """The text that the model is asked.

        Args:
            template: with `{question}`, and `{options}` for lettered lines of them.
        """
        lines = "\n".join(f"{letter}. {text}" for letter, text in self.lettered())
        return template.replace("{question}", self.question).replace("{options}", lines)

    def lettered(self) -> list[tuple[str, str]]:
        """[(A, first option), ...]."""
        return [(chr(ord("A") + i), option) for i, option in enumerate(self.options)]


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
    from eval_harness.sweep.metrics import metric_of

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
