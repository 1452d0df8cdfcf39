"""A start for compressors in the connector's place: rows like those that the language model knows.

Drawn at random, such rows say nothing to a language model, and its answers hardly say which way to
change them. What says it is the model's own connector: in the first steps each row is pulled to one
of the rows that it stands for, the one that is least like the rest of its image. (Their mean would
be that of the background nearly everywhere, and what is to be told from it a small part of the
distance.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from vlmcompress.core.errors import ConfigError
from vlmcompress.live.encoded import Encoded
from vlmcompress.methods.pipeline import Pipeline
from vlmcompress.methods.prompt.base import PromptCompressor
from vlmcompress.methods.trained import LearnedCompressor


class Fading(TrainerCallback):
    """Sets a trainee's pull: 1 at the first step, and 0 after so many."""

    def __init__(self, trainee: Any, steps: int) -> None:
        """Of a run."""
        self._trainee, self._steps = trainee, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fall along a line."""
        self._trainee.pull = max(0.0, 1 - state.global_step / self._steps)


def check_alignable(pipeline: Pipeline) -> None:
    """See that the rows the language model gets are made by trained weights.

    Raises:
        ConfigError: when they are not.
    """
    last = pipeline.stages[-1].method
    if isinstance(last, LearnedCompressor) and not isinstance(last, PromptCompressor):
        return
    raise ConfigError(
        f"align is for trained compressors between tower and language model, and the last stage is "
        f"{last.name!r}; leave it out."
    )


def distance(made: Encoded, whole: Encoded) -> Tensor:
    """How far compressed rows are from the rows that stand out where each of them stands.

    Args:
        made: compressed images; gradients go through their rows.
        whole: the same images with everything kept.

    Returns:
        Sum of squares over that of the wanted rows around their mean: 1 for rows that are all alike
        and in the middle.
    """
    pairs = [
        _pairs(rows, of, assigned)
        for rows, of, assigned in zip(
            _by_image(made), _by_image(whole), made.assignments, strict=True
        )
    ]
    found, wanted = (torch.cat(side) for side in zip(*pairs, strict=True))
    spread = (wanted - wanted.mean(0)).square().sum()
    return (found - wanted).square().sum() / spread.clamp_min(torch.finfo(spread.dtype).tiny)


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


def _by_image(encoded: Encoded) -> Sequence[Tensor]:
    features: Any = encoded.output.pooler_output
    if isinstance(features, Tensor) and features.ndim == 2:
        return features.split([len(kept) for kept in encoded.kept])
    return list(features)
