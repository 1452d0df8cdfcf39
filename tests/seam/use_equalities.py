"""The equalities of use: seeds, training, conversations."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.seam import matrix
from tests.seam.equalities import chosen, half, modes
from tests.seam.talk import Talk
from tests.seam.worlds import World, patched

#: Images and text tokens of each turn. A budget inside the language model is for all images of its
#: prompt, so that images of later turns would change what becomes of the first one's.
TURNS = {"decoder": ((2, 6), (0, 5), (0, 4))}
TURNS_WITH_IMAGES = ((2, 6), (0, 5), (1, 4))


@torch.no_grad()
def same_seed(w: World, method: str) -> None:
    """Same seed, same result; another seed, another one where a method draws; no global RNG."""
    told: Any = matrix.configured(method)
    if told.stochastic:
        told = dataclasses.replace(told, seed=None)
    before = torch.get_rng_state()
    first, again, other = (_drawn(w, told, half(method), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert all(map(torch.equal, first[1], again[1]))
    assert torch.equal(first[0], other[0]) == (not told.stochastic)


def _drawn(w: World, told: Any, keep: Any, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    with w.patched(told, keep, "auto", seed=seed) as handle:
        return w.model(**w.call).logits, chosen(handle.last)


def training(w: World, method: str) -> None:
    """The loss is one computed outside on restored logits; gradients; the same checkpointed."""
    model = copy.deepcopy(w.model).train()
    call = labelled(w)
    pixels = call["pixel_values"].requires_grad_()
    with patched(model, method, half(method), "auto"):
        out = model(**call, use_cache=False)
        out.loss.backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert pixels.grad.isfinite().all()
        assert pixels.grad.any()
        model.zero_grad()
        # A block of the tower that is run again is not reduced again, and `patch` refuses it.
        inner = matrix.stage_of(method) == "tower"
        checkpoint(model.get_decoder() if inner else model)
        loss = model(**call, use_cache=False).loss
        loss.backward()
    outside = cross_entropy(
        out.logits[:, :-1].flatten(0, 1), call["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, outside, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, out.loss, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in want and want[name].any():
            torch.testing.assert_close(parameter.grad, want[name], rtol=0, atol=1e-5)


def labelled(w: World) -> dict[str, Tensor]:
    """The batch with its text as labels, all but each row's first and those behind images."""
    call = {name: value.clone() for name, value in w.call.items()}
    ids, image = call["input_ids"], w.model.config.image_token_id
    text = w.valid & (ids < 100)
    after_image = torch.roll(ids == image, 1, 1)
    labels = ids.masked_fill(~text | after_image, -100)
    labels[torch.arange(len(labels)), call["attention_mask"].argmax(1)] = -100
    return {**call, "labels": labels}


def checkpoint(model: Any) -> None:
    """Switch activation checkpointing on, by its newer name where there is one."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()


@torch.no_grad()
def turns(w: World, method: str) -> None:
    """Three turns over a returned cache answer as one run over everything, without a cache."""
    for positions in modes(w, method):
        talk = Talk(w.model)
        with w.patched(method, half(method), positions):
            plan = TURNS.get(matrix.stage_of(method), TURNS_WITH_IMAGES)
            for turn, (images, text) in enumerate(plan):
                talk.say(images, text, seed=turn)
                whole = talk.answer_uncached(2)
                assert torch.equal(talk.answer(2), whole), f"turn {turn}"
