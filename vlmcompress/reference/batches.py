"""Training batches: scenes with their labels, and many questions packed behind one image."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .data import question_rng
from .labels import PatchLabels, patch_labels
from .questions import KINDS, Question, ask
from .scenes import OBJECT_SHARE, PATCHES, Scene, Split, scene
from .tokenizer import ASSISTANT, EOS, PAD, SPECIAL

IGNORED = -100
_ALWAYS = KINDS.index("count")  # every scene can be counted
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@dataclass(frozen=True)
class Packed:
    """Questions packed behind their image, ``[b, t]`` each.

    Attributes:
        ids: tokens of questions and answers.
        block: number of the question, -1 for padding. offset: position inside the question.
        target: the token that should follow, where an answer or its end does; else -100.
        kind: index of the question's kind.
        answer: whether ``target`` is the answer (and not the end that follows it).
        asked: ``[b, questions, 196]`` where the asked objects are: a distribution with the same
            part on each, or zeros where the answer is no.
    """

    ids: Tensor
    block: Tensor
    offset: Tensor
    target: Tensor
    kind: Tensor
    answer: Tensor
    asked: Tensor

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        return Packed(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class Encoder:
    """Remembers the tokens of every text it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = functools.lru_cache(maxsize=None)(tokenizer.encode)

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._encode(text)


def _asked(scenes: list[Scene], questions: list[list[Question]]) -> Tensor:
    """Where each question's objects are, ``[b, questions, 196]``."""
    table = np.zeros((len(scenes), max(map(len, questions)), PATCHES), np.float32)
    for row, drawn, asked in zip(table, scenes, questions, strict=True):
        for target, question in zip(row, asked, strict=False):
            if question.answer != "no":
                for i in question.about:
                    shares = drawn.items[i].coverage
                    shares = shares * (shares >= OBJECT_SHARE)
                    target += shares / (shares.sum() * len(question.about))
    return torch.from_numpy(table)


def pack(scenes: list[Scene], questions: list[list[Question]], encode: Encoder) -> Packed:
    """Pack each scene's questions into one row, each as the chat template would write it."""
    eos, assistant = SPECIAL.index(EOS), SPECIAL.index(ASSISTANT)
    rows = []
    for asked in questions:
        row: list[tuple[int, ...]] = []
        for block, question in enumerate(asked):
            answer = encode(f" {question.answer}")
            ids = [*encode(question.text), assistant, *answer]
            following = [*answer, eos]
            first = len(ids) - len(following)
            kind = KINDS.index(question.kind)
            for i, token in enumerate(ids):
                target = following[i - first] if i >= first else IGNORED
                row.append((token, block, i, target, kind, int(i >= first and target != eos)))
        rows.append(row)
    longest = max(len(row) for row in rows)
    padding = (SPECIAL.index(PAD), -1, 0, IGNORED, 0, 0)
    table = np.array([row + [padding] * (longest - len(row)) for row in rows])
    columns = [torch.from_numpy(table[..., i]) for i in range(6)]
    tokens, blocks, offsets, targets, kinds, answers = columns
    asked_where = _asked(scenes, questions)
    return Packed(tokens, blocks, offsets, targets, kinds, answers.bool(), asked_where)


@dataclass(frozen=True)
class Batch:
    """Scenes, their labels stacked ``[b, ...]``, and their packed questions."""

    scenes: list[Scene]
    labels: dict[str, Tensor]
    questions: list[list[Question]]
    packed: Packed

    def pixels(self) -> Tensor:
        """Normalised images ``[b, 3, 224, 224]``, as the processor makes them."""
        stacked = torch.from_numpy(np.stack([s.pixels for s in self.scenes]))
        return stacked.permute(0, 3, 1, 2).float().mul_(1 / (255 * _STD)).sub_(_MEAN / _STD)


def _stack(labels: list[PatchLabels]) -> dict[str, Tensor]:
    return {
        f.name: torch.from_numpy(np.stack([getattr(row, f.name) for row in labels]))
        for f in fields(PatchLabels)
    }


def make_batch(
    split: Split, indices: range, per_scene: int, mix: np.ndarray, encode: Encoder
) -> Batch:
    """Draw scenes and questions.

    Args:
        split: where the scenes come from.
        indices: scene numbers.
        per_scene: questions per scene; kinds that a scene does not allow are left out.
        mix: ``[8]`` probabilities of the kinds.
        encode: the tokenizer's memory.
    """
    scenes, questions = [], []
    for index in indices:
        drawn, rng = scene(split, index), question_rng(split, index)
        kinds = [*rng.choice(len(KINDS), per_scene, p=mix), _ALWAYS]
        found = [q for k in kinds if (q := ask(drawn, KINDS[k], rng)) is not None]
        asked = found[:-1] or found
        scenes.append(drawn)
        questions.append(asked)
    labels = _stack([patch_labels(s) for s in scenes])
    return Batch(scenes, labels, questions, pack(scenes, questions, encode))
