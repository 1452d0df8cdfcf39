"""Conversations about images, and batches of them with labels on what the assistant says."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError, DataError
from vlmcompress.training.distil import IGNORED

#: Name under which a batch says which of its images are equal.
SHOWN = "shown"


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: `user`, `assistant` or `system`.
        text: the words.
        images: how many images stand before them.
    """

    role: str
    text: str
    images: int = 0

    def message(self) -> dict[str, Any]:
        """As chat templates take it."""
        said = [{"type": "image"}] * self.images + [{"type": "text", "text": self.text}]
        return {"role": self.role, "content": said}


@dataclass(frozen=True)
class Conversation:
    """Turns about images.

    Attributes:
        turns: at least one of the assistant among them.
        images: RGB, in the order of the turns.
        row: of the data, for messages.
        shown: one key per image; equal keys mean equal images. Empty where that is not known.
    """

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()
    row: int = 0
    shown: tuple[Hashable, ...] = ()

    def __post_init__(self) -> None:
        """Check that there is something to learn and every image is there.

        Raises:
            DataError: naming the row.
        """
        if not any(turn.role == "assistant" for turn in self.turns):
            raise DataError(f"Row {self.row} has no turn of the assistant, so nothing to learn.")
        wanted = sum(turn.images for turn in self.turns)
        if wanted != len(self.images):
            raise DataError(
                f"Row {self.row} speaks of {wanted} image(s) and brings {len(self.images)}; write "
                "<image> once for each."
            )


@dataclass(frozen=True)
class Collator:
    """Conversations to a batch of the model's inputs.

    Every turn of the assistant has labels, its end included; everything else has none.

    Attributes:
        processor: with a chat template and a fast tokenizer.
    """

    processor: Any

    def __post_init__(self) -> None:
        """Check the processor.

        Raises:
            ConfigError: for one that cannot turn conversations into text, or text into tokens
                with their places.
        """
        if getattr(self.processor, "chat_template", None) is None:
            raise ConfigError(
                f"{type(self.processor).__name__} has no chat template, so that conversations "
                "cannot be written as the model expects them; set processor.chat_template."
            )
        if not getattr(self.processor.tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(self.processor.tokenizer).__name__} does not tell where its tokens stand "
                "in the text; use a fast tokenizer."
            )

    def __call__(self, rows: Sequence[Conversation | None]) -> dict[str, Tensor]:
        """One batch, padded on the left; rows that could not be read (None) are left out.

        Raises:
            DataError: when no row is left, or an answer cannot be found in what the processor made.
        """
        asked = [row for row in rows if row is not None]
        if not asked:
            raise DataError("No row of a batch can be used; repair the data or enlarge the batch.")
        written = [self._written(conversation) for conversation in asked]
        images = [image for conversation in asked for image in conversation.images]
        inputs = dict(
            self.processor(
                text=[text for text, _ in written],
                **({"images": images} if images else {}),
                padding=True,
                padding_side="left",
                add_special_tokens=not self._starts_itself(written[0][0]),
                return_tensors="pt",
            )
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        labels = torch.full_like(ids, IGNORED)
        for i, (conversation, (text, answers)) in enumerate(zip(asked, written, strict=True)):
            made = ids[i, mask[i]]
            places = self._answer_places(text, answers, made.tolist(), conversation.row)
            labels[i, mask[i].nonzero()[places, 0]] = made[places]
        shown = _shown(asked)
        return {**inputs, "labels": labels, **({} if shown is None else {SHOWN: shown})}

    def _written(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where in it the assistant speaks, ends included."""
        messages = [turn.message() for turn in conversation.turns]
        text, spans = self._text(messages), []
        for i, turn in enumerate(conversation.turns):
            if turn.role != "assistant":
                continue
            begin, end = self._text(messages[:i], prompting=True), self._text(messages[: i + 1])
            if not (end.startswith(begin) and text.startswith(end)):
                raise DataError(
                    f"Row {conversation.row}: the chat template writes the turns before an "
                    "answer otherwise once it is there, so that its place is not known; use a "
                    "template that only appends."
                )
            spans.append((len(begin), len(end)))
        return self._with_ends(text, spans)

    def _with_ends(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The same, with the end of the sequence written behind answers that templates leave open.

        Vicuna's template is one: without an end the model would not learn to stop.
        """
        ending = self.processor.tokenizer.eos_token or ""
        special = self.processor.tokenizer.all_special_tokens
        written, marked, at = "", [], 0
        for begin, end in spans:
            said = text[begin:end].rstrip()
            closed = any(said.endswith(token) for token in special)
            written += text[at:begin]
            marked.append((len(written), len(written) + len(said) + (0 if closed else len(ending))))
            written += said + ("" if closed else ending)
            at = begin + len(said)
        return written + text[at:], marked

    def _text(self, messages: Sequence[Any], *, prompting: bool = False) -> str:
        text: str = self.processor.apply_chat_template(
            list(messages), add_generation_prompt=prompting, tokenize=False
        )
        return text

    def _starts_itself(self, text: str) -> bool:
        """Whether the template writes the begin of the sequence, which is not to come twice."""
        start = self.processor.tokenizer.bos_token
        return start is not None and text.startswith(start)

    def _answer_places(
        self, text: str, answers: Sequence[tuple[int, int]], made: Sequence[int], row: int
    ) -> list[int]:
        """Columns, without padding, of the tokens that the assistant says.

        Args:
            text: with one placeholder per image.
            answers: places of the answers in it.
            made: ids, in which processors have replaced each placeholder by many.
            row: for messages.
        """
        tokenizer = self.processor.tokenizer
        plain = tokenizer(
            text, add_special_tokens=not self._starts_itself(text), return_offsets_mapping=True
        )
        image = getattr(self.processor, "image_token", None)
        placeholder = None if image is None else tokenizer.convert_tokens_to_ids(str(image))
        where = aligned(plain["input_ids"], made, placeholder)
        if where is None:
            raise DataError(
                f"Row {row}: the words of the conversation cannot be found in the tokens that "
                f"{type(self.processor).__name__} made of it."
            )
        # What stands right behind an image is predicted from a row that may have been dropped.
        behind = [False, *(place < 0 for place in where[:-1])]
        return [
            place
            for (start, end), place, first in zip(
                plain["offset_mapping"], where, behind, strict=True
            )
            if place > 0 and not first and any(start < b and end > a for a, b in answers)
        ]


def aligned(plain: Sequence[int], made: Sequence[int], placeholder: int | None) -> list[int] | None:
    """Where tokens of a text stand once every placeholder has become a run of others.

    Args:
        plain: ids of the text with one placeholder per image.
        made: ids with runs of one token or more in their place, markers of rows and ends included.
        placeholder: its id.

    Returns:
        [len(plain)] index in `made`, -1 for placeholders; None when they do not fit together.
    """
    cuts = [i for i, token in enumerate(plain) if token == placeholder]
    edges = [-1, *cuts, len(plain)]
    where = [-1] * len(plain)
    at = 0
    for number, (before, after) in enumerate(pairwise(edges)):
        words = list(plain[before + 1 : after])
        last = number == len(edges) - 2
        if number == 0:
            found = 0 if list(made[: len(words)]) == words else None
        elif last:
            found = len(made) - len(words)
            found = found if found > at and list(made[found:]) == words else None
        else:
            found = _find(words, made, at + 1)
        if found is None or (last and found + len(words) != len(made)):
            return None
        where[before + 1 : after] = range(found, found + len(words))
        at = found + len(words)
    return where


def _find(words: Sequence[int], made: Sequence[int], start: int) -> int | None:
    """The first place from `start` on where `words` stand."""
    ends = range(start, len(made) - len(words) + 1)
    return next((i for i in ends if list(made[i : i + len(words)]) == list(words)), None)


def _shown(asked: Sequence[Conversation]) -> Tensor | None:
    """[rows] number of the image that each row shows; None where rows do not show one each."""
    if any(len(conversation.shown) != 1 for conversation in asked):
        return None
    keys = [conversation.shown[0] for conversation in asked]
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([order[key] for key in keys])
