"""Training batches: scenes with their labels, and many questions packed behind one image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .data import question_rng
from .labels import PatchLabels, patch_labels
from .questions import Question
from .scenes import OBJECT_SHARE, PATCHES, Drawn, Split
from .tokenizer import ASSISTANT, EOS, PAD, SPECIAL
from .worlds import ALL_KINDS, OBJECTS, TEXTS, World

IGNORED = -100
_GOLDEN = 0.6180339887498949
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
        answer: whether ``target`` belongs to the answer (and is not the end that follows it).
        slot: row of ``asked`` that shows what the target is read from.
        asked: ``[b, slots, 196]`` where the asked items are: a distribution with the same part on
            each, or zeros where the answer is no.
    """

    ids: Tensor
    block: Tensor
    offset: Tensor
    target: Tensor
    kind: Tensor
    answer: Tensor
    slot: Tensor
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


def _where(drawn: Drawn, items: tuple[int, ...]) -> np.ndarray:
    """Where some items are, ``[196]``: a distribution with the same part on each."""
    shares = np.stack([drawn.items[i].coverage for i in items])
    shares = shares * (shares >= OBJECT_SHARE)
    return (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)


def _places(drawn: Drawn, question: Question) -> list[np.ndarray]:
    """Where each letter of an answer is seen: one place for an answer that is no text."""
    if question.answer == "no":
        return [np.zeros(PATCHES)]
    return [_where(drawn, items) for items in question.points or (question.about,)]


def pack(scenes: Sequence[Drawn], questions: list[list[Question]], encode: Encoder) -> Packed:
    """Pack each scene's questions into one row, each as the chat template would write it."""
    eos, assistant = SPECIAL.index(EOS), SPECIAL.index(ASSISTANT)
    rows, places = [], []
    for drawn, asked in zip(scenes, questions, strict=True):
        row: list[tuple[int, ...]] = []
        seen: list[np.ndarray] = []
        for block, question in enumerate(asked):
            answer = encode(f" {question.answer}")
            ids = [*encode(question.text), assistant, *answer]
            following = [*answer, eos]
            first = len(ids) - len(following)
            kind = ALL_KINDS.index(question.kind)
            here = _places(drawn, question)
            for i, token in enumerate(ids):
                target = following[i - first] if i >= first else IGNORED
                letter = max(0, i - first - (len(answer) - len(here)))  # the first may be a space
                slot = len(seen) + min(letter, len(here) - 1)
                answers = int(i >= first and target != eos)
                row.append((token, block, i, target, kind, answers, slot))
            seen += here
        rows.append(row)
        places.append(seen)
    longest = max(len(row) for row in rows)
    padding = (SPECIAL.index(PAD), -1, 0, IGNORED, 0, 0, 0)
    table = np.array([row + [padding] * (longest - len(row)) for row in rows])
    columns = [torch.from_numpy(table[..., i]) for i in range(7)]
    tokens, blocks, offsets, targets, kinds, answered, slots = columns
    where = np.zeros((len(rows), max(map(len, places)), PATCHES), np.float32)
    for into, seen in zip(where, places, strict=True):
        into[: len(seen)] = seen
    asked_where = torch.from_numpy(where)
    return Packed(tokens, blocks, offsets, targets, kinds, answered.bool(), slots, asked_where)


def pixels_of(scenes: Sequence[Drawn]) -> Tensor:
    """Normalised images ``[b, 3, 224, 224]``, as the processor makes them."""
    stacked = torch.from_numpy(np.stack([s.pixels for s in scenes]))
    return stacked.permute(0, 3, 1, 2).float().mul_(1 / (255 * _STD)).sub_(_MEAN / _STD)


@dataclass(frozen=True)
class Batch:
    """Scenes, their labels stacked ``[b, ...]``, and their packed questions."""

    scenes: list[Drawn]
    labels: dict[str, Tensor]
    questions: list[list[Question]]
    packed: Packed

    def pixels(self) -> Tensor:
        """Normalised images, see `pixels_of`."""
        return pixels_of(self.scenes)


def _stack(labels: list[PatchLabels]) -> dict[str, Tensor]:
    return {
        f.name: torch.from_numpy(np.stack([getattr(row, f.name) for row in labels]))
        for f in fields(PatchLabels)
    }


def make_batch(
    split: Split,
    indices: range,
    per_scene: int,
    mix: np.ndarray,
    encode: Encoder,
    text_share: float = 0.0,
) -> Batch:
    """Draw scenes and questions.

    Args:
        split: where the scenes come from.
        indices: scene numbers.
        per_scene: questions per scene; kinds that a scene does not allow are left out.
        mix: ``[11]`` how often each kind is asked, in relation to the others of its world.
        encode: the tokenizer's memory.
        text_share: share of the scenes that are text-heavy; they lie evenly among the indices.
    """
    scenes, questions = [], []
    for index in indices:
        world = TEXTS if (index * _GOLDEN) % 1 < text_share else OBJECTS
        drawn, rng = world.draw(split, index), question_rng(split, index)
        weights = np.array([mix[ALL_KINDS.index(kind)] for kind in world.kinds])
        picked = rng.choice(len(world.kinds), per_scene, p=weights / weights.sum())
        found = [q for i in picked if (q := world.ask(drawn, world.kinds[i], rng)) is not None]
        scenes.append(drawn)
        questions.append(found or _any_question(world, drawn, rng))
    labels = _stack([patch_labels(s) for s in scenes])
    return Batch(scenes, labels, questions, pack(scenes, questions, encode))


def _any_question(world: World, drawn: Drawn, rng: np.random.Generator) -> list[Question]:
    """One question of the first kind that the scene allows; every scene allows some."""
    asked = (world.ask(drawn, kind, rng) for kind in world.kinds)
    return [next(question for question in asked if question is not None)]
