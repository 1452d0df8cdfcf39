"""A start for compressors in the connector's place: rows like those that the language model knows.

Drawn at random, such rows say nothing to a language model, and its answers hardly say which way to
change them. What says it is the model's own connector: in the first steps each row learns to be one
of the rows that it stands for, the one that is least like the rest of its image, and the language
model does not run. (Their mean would be that of the background nearly everywhere, and what is to be
told from it a small part of the distance.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from vlmcompress.core.errors import ConfigError
from vlmcompress.live.encoded import Encoded
from vlmcompress.methods.pipeline import Pipeline
from vlmcompress.methods.prompt.base import PromptCompressor
from vlmcompress.methods.trained import LearnedCompressor


class Aligning(TrainerCallback):
    """Tells a trainee in which steps it aligns: in the first so many, whose moments it forgets."""

    def __init__(self, trainee: Any, steps: int) -> None:
        """Of a run."""
        self._trainee, self._steps = trainee, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell."""
        self._trainee.aligning = state.global_step < self._steps
        if state.global_step == self._steps:  # steps would be scaled by gradients of another loss
            optimizer = kwargs["optimizer"]
            getattr(optimizer, "optimizer", optimizer).state.clear()  # accelerate wraps it


def aligned(pipeline: Pipeline) -> LearnedCompressor:
    """The method that makes the rows which the language model gets.

    Raises:
        ConfigError: when it makes none by trained weights.
    """
    last = pipeline.stages[-1].method
    if isinstance(last, LearnedCompressor) and not isinstance(last, PromptCompressor):
        return last
    raise ConfigError(
        f"align is for trained compressors between tower and language model, and the last stage is "
        f"{last.name!r}; leave it out."
    )


def distance(made: Encoded, whole: Encoded, *, placeless: bool = False) -> Tensor:
    """How far compressed rows are from the rows that stand out where each of them stands.

    Args:
        made: compressed images; gradients go through their rows.
        whole: the same images with everything kept.
        placeless: whether rows stand for the tokens next to their places, and not for those that
            attend to them, which change as rows learn.

    Returns:
        Sum of squares over that of the wanted rows around their mean: 1 for rows that are all alike
        and in the middle.
    """
    groups = made.assignments
    if placeless:
        groups = tuple(map(_nearest, made.kept, made.lengths))
    pairs = [
        _pairs(rows, of, assigned)
        for rows, of, assigned in zip(made.features, whole.features, groups, strict=True)
    ]
    found, wanted = (torch.cat(side) for side in zip(*pairs, strict=True))
    spread = (wanted - wanted.mean(0)).square().sum()
    return (found - wanted).square().sum() / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def _nearest(places: Tensor, n: int) -> Tensor:
    """[n] the place next to each token of an image, in reading order."""
    tokens = torch.arange(n, device=places.device)
    return (tokens[:, None] - places).abs().argmin(1)


def _pairs(rows: Tensor, whole: Tensor, assigned: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows that stand for something, and the row that each is wanted to be, in float32.

    Args:
        rows: [k, d].
        whole: [n, d].
        assigned: [n] row of each of `whole`, -1 for none; None where every row is its own.
    """
    rows, whole = rows.float(), whole.detach().float()
    if assigned is None:
        return rows, whole
    place = outstanding(whole, assigned, len(rows))
    taken = place < len(whole)
    return rows[taken], whole[place[taken]]


def outstanding(whole: Tensor, assigned: Tensor, k: int) -> Tensor:
    """[k] int64, of each group of rows the one farthest from the mean of all; n for empty groups.

    Args:
        whole: [n, d].
        assigned: [n] group of each row, -1 for none.
        k: groups.
    """
    n, known = len(whole), assigned >= 0
    apart = (whole - whole.mean(0)).norm(dim=1)
    most = apart.new_full((k,), -1.0).scatter_reduce(0, assigned[known], apart[known], "amax")
    best = known & (apart == most[assigned.clamp_min(0)])
    place = torch.arange(n, device=whole.device)[best]
    return place.new_full((k,), n).scatter_reduce(0, assigned[best], place, "amin")
