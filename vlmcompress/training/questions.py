"""Batches of questions with their answers, for losses on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from eval_harness.replay import repeated
from vlmcompress.reference.data import Sample, samples
from vlmcompress.reference.worlds import world as find_world

_IGNORED = -100
#: Every so many batches one is of text-heavy scenes.
_TEXTS_EVERY = 4
#: Seeds of a run begin so far apart that no scene comes in two of them.
_SEED_STEP = 10**8


def batch_of(step: int, size: int, seed: int, *, one_each: bool = False) -> list[Sample]:
    """Questions about scenes of the training split; those of a step do not depend on other steps.

    Args:
        step: number of the batch.
        size: questions, at least 1.
        seed: of the run.
        one_each: whether each is about a scene of its own.
    """
    # A scene allows one question of each of its kinds at most, so that `size` scenes may be asked.
    first = (seed + 1) * _SEED_STEP + step * 2 * size
    world = "text" if step % _TEXTS_EVERY == _TEXTS_EVERY - 1 else "objects"
    if one_each:
        return [_one_of(first + i, i, world) for i in range(size)]
    return list(samples("train", size, first, world=world))


def _one_of(scene: int, turn: int, world: str) -> Sample:
    """One question about a scene, of the kinds in turn as far as it allows them."""
    kinds = len(find_world(world).kinds)
    stream = samples("train", kinds, scene, world=world)
    asked = [next(stream)]
    asked += takewhile(lambda sample: sample.scene_id == asked[0].scene_id, stream)
    return asked[turn % len(asked)]


def encoded(processor: Any, asked: Sequence[Sample]) -> dict[str, Tensor]:
    """Inputs of a batch with its labels: answers and their ends, -100 elsewhere.

    Args:
        processor: with a chat template.
        asked: questions with images and answers.
    """
    prompts = [_text(processor, sample) for sample in asked]
    whole = [_text(processor, sample, sample.answer) for sample in asked]
    inputs = dict(
        processor(
            text=whole,
            images=[sample.image for sample in asked],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    )
    # The answer is what the text grows by; image tokens are the same with and without it.
    without, with_answer = (_lengths(processor, texts) for texts in (prompts, whole))
    ids = inputs["input_ids"]
    behind = ids.shape[1] - torch.arange(ids.shape[1])
    answered = behind <= (with_answer - without)[:, None]
    inputs["labels"] = torch.where(answered, ids, _IGNORED)
    return inputs


def _lengths(processor: Any, texts: Sequence[str]) -> Tensor:
    return torch.tensor([len(ids) for ids in processor.tokenizer(list(texts)).input_ids])


def _text(processor: Any, sample: Sample, answer: str | None = None) -> str:
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    text: str = processor.apply_chat_template(messages, add_generation_prompt=answer is None)
    return text


def encoded_once(handle: Any, inputs: dict[str, Tensor], asked: Sequence[Sample]) -> dict[str, Any]:
    """The same inputs, with every scene gone through the tower once instead of pixels.

    Args:
        handle: of the patched model, with no method in the tower or behind it.
        inputs: of a batch.
        asked: its questions; those of one scene share an image.
    """
    scenes = list(dict.fromkeys(sample.scene_id for sample in asked))
    images = [scenes.index(sample.scene_id) for sample in asked]
    first = [images.index(image) for image in range(len(scenes))]
    made = handle.encode(pixel_values=inputs["pixel_values"][first])
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return {**rest, "mm_encoder_outputs": repeated(made, images)}


def right_share(logits: Tensor, labels: Tensor) -> float:
    """Share of answers of which every token is the likeliest.

    Args:
        logits: [B, L, V].
        labels: [B, L].
    """
    wanted = labels[:, 1:]
    right = (logits[:, :-1].argmax(-1) == wanted) | (wanted == _IGNORED)
    return float(right.all(1).float().mean())
