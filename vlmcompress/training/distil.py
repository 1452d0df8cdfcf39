"""Losses on the tokens of answers: cross entropy, and distance from a teacher's distribution.

Distillation as in Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network"
(https://arxiv.org/abs/1503.02531), section 2: T^2 KL(teacher || student) of distributions softened
by the temperature T. The teacher here is the same model with everything kept and no adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100
#: Rows whose logits are held in float32 at a time.
_CHUNK = 64


@dataclass(frozen=True)
class AnswerTokens:
    """Where the tokens of answers are, and which they are.

    Attributes:
        columns: [C] the columns that predict a token of an answer in some row, ascending.
        rows: [N] row of each token.
        places: [N] index into `columns` of what predicts it.
        tokens: [N] ids.
    """

    columns: Tensor
    rows: Tensor
    places: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> AnswerTokens:
        """Of labels [B, L], -100 at what is no answer; nothing predicts the first column."""
        wanted = labels[:, 1:] != IGNORED
        columns = wanted.any(0).nonzero()[:, 0]
        rows, places = wanted[:, columns].nonzero(as_tuple=True)
        return cls(columns, rows, places, labels[rows, columns[places] + 1])

    def logits(self, logits: Tensor) -> Tensor:
        """[N, V] of the logits [B, C, V] at `columns`."""
        return logits[self.rows, self.places]


def answer_losses(
    student: Tensor, tokens: Tensor, teacher: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of cross entropy, and of the distance from a teacher.

    Logits become float32 a few rows at a time, in the backward pass again, so that no such copy of
    all rows exists.

    Args:
        student: [N, V] logits in any precision.
        tokens: [N] ids.
        teacher: [N, V] logits; None for no distance, which is 0 then.
        temperature: that softens both distributions.

    Returns:
        Two scalars in float32.
    """
    entropy = distance = torch.zeros((), device=student.device)
    for start in range(0, len(tokens), _CHUNK):
        part = slice(start, start + _CHUNK)
        target = None if teacher is None else teacher[part]
        found = checkpoint(
            _of_rows,
            student[part],
            tokens[part],
            target,
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        entropy, distance = entropy + found[0], distance + found[1]
    return entropy, distance


def _of_rows(
    student: Tensor, tokens: Tensor, teacher: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = student.float()
    entropy = functional.cross_entropy(logits, tokens, reduction="sum")
    if teacher is None:
        return entropy, entropy.new_zeros(())
    distance = functional.kl_div(
        functional.log_softmax(logits / temperature, -1),
        functional.log_softmax(teacher.float() / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    return entropy, temperature**2 * distance
