"""What text-aware methods are told: the question of each sample, found in its prompt or given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmcompress.core.errors import MissingTextError, UnsupportedInputError
from vlmcompress.live.clip import TextSource
from vlmcompress.live.reader import QuestionReader
from vlmcompress.methods.base import Needs

#: Stands for the user's text while a chat template is taken apart; letters, so that no template and
#: no tokenizer treats it otherwise.
_MARK = "QUESTIONGOESHERE"


@dataclass
class Asked:
    """The questions of one call.

    Attributes:
        questions: one per row of the batch.
        placeholders: image placeholders per row.
        source: embeds questions and patches in one space; None where no method wants that.
        reader: lets the language model read questions; None likewise.
        known: embeddings made so far.
        read: vectors of questions that were read.
    """

    questions: tuple[str, ...]
    placeholders: tuple[int, ...]
    source: TextSource | None = None
    reader: QuestionReader | None = None
    known: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)

    def text(self, images: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Embeddings of the questions that some images belong to.

        Args:
            images: numbers of the images wanted.
            lengths: tokens of every image of the call.

        Returns:
            [images, m, e], short ones filled up with rows of zeros.
        """
        assert self.source is not None  # `asked` has seen to it
        wanted = self._of(images, lengths)
        new = [text for text in dict.fromkeys(wanted) if text not in self.known]
        if new:
            self.known.update(zip(new, self.source.texts(new), strict=True))
        parts = [self.known[text] for text in wanted]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def read_all(self) -> None:
        """Let the language model read every question that an image belongs to, each once."""
        about = [q for q, n in zip(self.questions, self.placeholders, strict=True) if n]
        texts = list(dict.fromkeys(about))
        if self.reader is not None and texts:
            self.read.update(zip(texts, self.reader.vectors(texts), strict=True))

    def vectors(self, images: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """[images, d] what the language model makes of the questions that some images belong to.

        Args:
            images: numbers of the images wanted.
            lengths: tokens of every image of the call.
        """
        return torch.stack([self.read[text] for text in self._of(images, lengths)])

    def _of(self, images: Sequence[int], lengths: Sequence[int]) -> list[str]:
        rows = rows_of(self.placeholders, lengths)
        return [self.questions[rows[i]] for i in images]


def rows_of(placeholders: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The row of the batch that each image belongs to: images fill the placeholders in their order.

    Args:
        placeholders: of images, in each row.
        lengths: tokens of every image.
    """
    ends = torch.tensor(placeholders).cumsum(0)
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    # Too many images are an error that is raised where they are placed.
    return torch.searchsorted(ends, starts, right=True).clamp(max=len(ends) - 1).tolist()


def asked(
    model: Any,
    call: Mapping[str, Any],
    needs: Needs,
    source: TextSource | None,
    processor: Any,
    given: Any,
    *,
    held: int = 0,
) -> Asked:
    """The questions of a call.

    Args:
        model: the outer model.
        call: the caller's arguments; `question` stands before everything else.
        needs: what the methods ask for, the question among it.
        source: from `patch(clip=...)`.
        processor: from `patch(processor=...)`; the question is found in the prompt by its template.
        given: from `patch(question=...)`.
        held: columns of the ids that are in the call's cache; its images fill those that follow.

    Raises:
        MissingTextError: when there is no source or no tokenizer, or neither a question nor a
            processor.
        UnsupportedInputError: when the questions do not match the batch.
    """
    if needs.text and source is None:
        raise MissingTextError(
            "The method reads the question: pass patch(..., clip=...), the CLIP model whose vision "
            "tower this is."
        )
    reader = QuestionReader.of(model, processor) if needs.question else None
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor):
        raise MissingTextError(
            "The method reads the question, and images came without input_ids, which say whose "
            "question each image belongs to."
        )
    placeholders = (ids[:, held:] == model.config.image_token_id).sum(1).tolist()
    questions = call.get("question") if call.get("question") is not None else given
    if questions is None:
        questions = found(model, ids, call.get("attention_mask"), processor)
    if isinstance(questions, str):
        questions = [questions] * len(ids)
    questions = _checked(questions, placeholders)
    return Asked(questions, tuple(placeholders), source if needs.text else None, reader)


def _checked(questions: Any, placeholders: Sequence[int]) -> tuple[str, ...]:
    if not isinstance(questions, list | tuple) or not all(isinstance(q, str) for q in questions):
        raise UnsupportedInputError(
            f"question is {questions!r}; give a text, or a list of one text per row of the batch."
        )
    if len(questions) != len(placeholders):
        raise UnsupportedInputError(
            f"There are {len(questions)} questions for a batch of {len(placeholders)} rows; give "
            "one per row, or a single text for all."
        )
    empty = [b for b, q in enumerate(questions) if placeholders[b] and not q.strip()]
    if empty:
        raise MissingTextError(
            f"Row {empty[0]} has an image and no question that could be found; pass question=..."
        )
    return tuple(questions)


def found(model: Any, ids: Tensor, mask: Any, processor: Any) -> list[str]:
    """The user's text of the last turn of every row, without template and special tokens.

    Raises:
        MissingTextError: without a processor that can decode ids.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "decode"):
        raise MissingTextError(
            "The method reads the question: pass patch(..., processor=processor), by which it is "
            "found in the prompt, or question=... with the call."
        )
    header, footer = turn_marks(processor)
    special = [*getattr(tokenizer, "all_special_tokens", [])]
    image = tokenizer.decode([model.config.image_token_id])
    whole = torch.ones_like(ids) if not isinstance(mask, Tensor) or mask.ndim != 2 else mask
    texts = []
    for row, valid in zip(ids, whole, strict=True):
        kept = row[(valid > 0) & (row != model.config.image_token_id)]
        text = tokenizer.decode(kept.tolist(), skip_special_tokens=False)
        texts.append(_plain(_last_turn(text, header, footer), [*special, image]))
    return texts


def turn_marks(processor: Any) -> tuple[str, str]:
    """What stands before and after the user's text of a turn; empty where there is no template.

    Read off the processor's own chat template: it is filled with marks.
    """
    turns = [("user", _MARK + "A"), ("assistant", "B"), ("user", _MARK + "C")]
    for parts in (True, False):
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in turns
        ]
        try:
            text = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception:  # a template may refuse one of the two forms in any way, or be absent
            continue
        pieces = text.split(_MARK)
        if len(pieces) == 3:
            first, between, last = pieces[0], pieces[1][1:], pieces[2][1:]
            return _common_end(first, between).strip(), last.strip()
    return "", ""


def _common_end(a: str, b: str) -> str:
    n = 0
    while n < min(len(a), len(b)) and a[-n - 1] == b[-n - 1]:
        n += 1
    return a[len(a) - n :]


def _last_turn(text: str, header: str, footer: str) -> str:
    """From the last header to the footer that follows it; all of it where there is no header."""
    start = text.rfind(header) if header else -1
    text = text[start + len(header) :] if start >= 0 else text
    end = text.rfind(footer) if footer else -1
    return text[:end] if end >= 0 else text


def _plain(text: str, special: Sequence[str]) -> str:
    """Without special tokens, white space made single."""
    for token in sorted(filter(None, special), key=len, reverse=True):
        text = text.replace(token, " ")
    return re.sub(r"\s+", " ", text).strip()
