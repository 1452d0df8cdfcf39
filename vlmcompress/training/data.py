"""What is trained on: conversations in LLaVA's format, and drawn scenes of the reference model.

A stream has one item for every question of a run, in their order, so that where a run stands is
known from its step alone.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from vlmcompress.core.errors import ConfigError, DataError
from vlmcompress.core.extras import require
from vlmcompress.training.conversations import Conversation, Turn
from vlmcompress.training.questions import batch_of

Broken = Literal["raise", "skip"]
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_IMAGE = "<image>"
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class Stream(Protocol):
    """The questions of a run, in their order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation | None: ...


class Source(Protocol):
    """Where a run's questions come from."""

    def stream(self, steps: int, size: int, seed: int) -> Stream:
        """One item for every question of a run.

        Args:
            steps: of the optimiser.
            size: questions per step, of all processes together.
            seed: of the run.
        """


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes of the reference model's training split; no test question is about one.

    Attributes:
        one_each: whether every question of a step is about a scene of its own: more images to
            learn from, and as many to run through the tower. Otherwise a scene serves several.
    """

    one_each: bool = False

    def stream(self, steps: int, size: int, seed: int) -> Stream:
        """Questions drawn as the run goes."""
        return Drawn(steps, size, seed, self.one_each)


@dataclass(frozen=True)
class Rows:
    """Rows in LLaVA's format, see `conversation`.

    Attributes:
        rows: of the data set.
        folder: that paths of images are relative to; None for the working directory.
        broken: whether rows that cannot be used stop the run (`raise`), or are reported and left
            out (`skip`).
    """

    rows: Sequence[Mapping[str, Any]]
    folder: Path | None = None
    broken: Broken = "raise"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: for an unknown way to treat broken rows.
            DataError: for an empty data set.
        """
        if self.broken not in get_args(Broken):
            raise ConfigError(f"broken is {self.broken!r}; allowed are 'raise' and 'skip'.")
        if not len(self.rows):
            raise DataError("The data set has no rows.")

    def stream(self, steps: int, size: int, seed: int) -> Stream:
        """The rows, shuffled anew in every pass."""
        return Conversations(self, steps * size, seed)


@dataclass
class Drawn:
    """Questions about drawn scenes of the training split.

    Attributes:
        steps: of the optimiser.
        size: questions per step, of all processes together.
        seed: of the run.
        one_each: as `Scenes` has it.
    """

    steps: int
    size: int
    seed: int = 0
    one_each: bool = False
    _latest: tuple[int, Sequence[Any]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.steps * self.size

    def __getitem__(self, index: int) -> Conversation:
        """The question of that number in the run."""
        if index >= len(self):
            raise IndexError(index)
        step, place = divmod(index, self.size)
        if self._latest is None or self._latest[0] != step:
            asked = batch_of(step, self.size, self.seed, one_each=self.one_each)
            self._latest = (step, asked)
        sample = self._latest[1][place]
        turns = (Turn("user", sample.question, 1), Turn("assistant", sample.answer))
        return Conversation(turns, (sample.image,), index, (sample.scene_id,))


@dataclass
class Conversations:
    """The rows of a source in the order of a run.

    Attributes:
        source: the rows.
        length: questions of the run.
        seed: of the order.
    """

    source: Rows
    length: int
    seed: int = 0
    _order: tuple[int, Any] | None = field(default=None, repr=False)
    _reported: set[int] = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        return self.length

    def row_of(self, index: int) -> int:
        """The row that is the run's item of that number."""
        turn, place = divmod(index, len(self.source.rows))
        if self._order is None or self._order[0] != turn:
            order = np.random.default_rng([self.seed, turn]).permutation(len(self.source.rows))
            self._order = (turn, order)
        return int(self._order[1][place])

    def __getitem__(self, index: int) -> Conversation | None:
        """The conversation of that number, None for a row that is left out.

        Raises:
            DataError: naming the row that cannot be used.
        """
        if index >= len(self):
            raise IndexError(index)
        number = self.row_of(index)
        try:
            return conversation(self.source.rows[number], number, self.source.folder)
        except DataError as error:
            if self.source.broken == "raise":
                raise
            if number not in self._reported:
                self._reported.add(number)
                warnings.warn(f"{error} The row is left out.", stacklevel=2)
            return None


def conversation(row: Mapping[str, Any], number: int, folder: Path | None = None) -> Conversation:
    r"""A row in LLaVA's format.

    `{"image": path or picture, "conversations": [{"from": "human", "value": "<image>\n..."},
    {"from": "gpt", "value": "..."}, ...]}`; `images` is a list of several, and a row without any is
    a conversation without images. `role` and `content` are understood for `from` and `value`. Where
    no turn says `<image>`, all images stand in the first one.

    Args:
        row: of the data set.
        number: of the row, for messages.
        folder: that paths are relative to.

    Raises:
        DataError: for anything else, naming the row.
    """
    said = row.get("conversations", row.get("messages"))
    if not isinstance(said, Sequence) or isinstance(said, str) or not said:
        raise DataError(f"Row {number} has no list of `conversations`; its keys are {sorted(row)}.")
    given = row.get("images") or row.get("image") or []
    images = given if isinstance(given, list) else [given]
    turns = [_turn(one, number) for one in said]
    if images and not any(turn.images for turn in turns):
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
        turns[first] = Turn(turns[first].role, turns[first].text, len(images))
    opened = tuple(_opened(image, number, folder) for image in images)
    names = [image for image in images if isinstance(image, str)]
    keys: tuple[Any, ...] = tuple(names) if len(names) == len(images) else (number,) * len(images)
    return Conversation(tuple(turns), opened, number, keys)


def _turn(said: Any, number: int) -> Turn:
    if not isinstance(said, Mapping):
        raise DataError(f"Row {number} has a turn that is {said!r}; it must be a mapping.")
    role, text = said.get("from", said.get("role")), said.get("value", said.get("content"))
    if role not in _ROLES or not isinstance(text, str):
        raise DataError(
            f"Row {number} has a turn from {role!r} that says {text!r}; it must be a text from one "
            f"of {', '.join(_ROLES)}."
        )
    words = text.replace(_IMAGE, "").strip()
    if not words and _ROLES[role] == "assistant":
        raise DataError(f"Row {number} has an empty answer.")
    return Turn(_ROLES[role], words, text.count(_IMAGE))


def _opened(image: Any, number: int, folder: Path | None) -> Any:
    """An RGB picture from a path, from bytes as `datasets` keeps them, or from a picture.

    Raises:
        DataError: for one that is missing or broken.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        if isinstance(image, Mapping) and image.get("bytes") is not None:
            return Image.open(io.BytesIO(image["bytes"])).convert("RGB")
        path = image.get("path") if isinstance(image, Mapping) else image
        if not isinstance(path, str):
            raise DataError(f"Row {number}: an image is {type(image).__name__}, not a path.")
        return Image.open((folder or Path()) / path).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        named = image if isinstance(image, str) else "the image"
        raise DataError(f"Row {number}: {named} cannot be read ({error}).") from error


def rows_of(source: str, split: str = "train") -> Sequence[Mapping[str, Any]]:
    """The rows of a local file or of a data set on the hub.

    Args:
        source: a .json, .jsonl or .parquet file, or a hub id.
        split: of the hub's data set.

    Raises:
        DataError: for a file or data set that cannot be read.
        ConfigError: for a file of another kind.
        MissingExtraError: without `datasets`.
    """
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        return _listed(path)
    datasets = require("datasets")
    if path.suffix in _FORMATS or path.exists():
        kind = _FORMATS.get(path.suffix)
        if kind is None or not path.is_file():
            raise ConfigError(
                f"{source} is no file of training data; allowed are {', '.join(_FORMATS)} files "
                "and hub ids."
            )
        options: dict[str, Any] = {"path": kind, "data_files": str(path), "split": "train"}
    else:
        options = {"path": source, "split": split}
    try:
        return _undecoded(datasets, datasets.load_dataset(**options))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source} cannot be read as training data: {error}") from error


def _undecoded(datasets: Any, rows: Any) -> Any:
    """Pictures as bytes, so that a broken one is met when its row is, and the row can be named."""
    raw = datasets.Image(decode=False)
    for name in rows.column_names:
        kind = rows.features[name]
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(name, raw)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            rows = rows.cast_column(name, type(kind)(raw))
    return rows


def _listed(path: Path) -> Sequence[Mapping[str, Any]]:
    """A JSON list, as LLaVA publishes its data; Arrow would refuse rows of differing shapes."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON ({error}).") from error
    if not isinstance(found, list) or not all(isinstance(row, Mapping) for row in found):
        raise DataError(f"{path} must hold a list of rows.")
    return found
