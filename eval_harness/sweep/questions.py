"""A question about pictures, and pictures that are opened when they are needed."""

from __future__ import annotations

import io
from collections.abc import Mapping
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
