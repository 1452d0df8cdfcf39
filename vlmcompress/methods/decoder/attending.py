"""Attention of many rows, a few at a time, so that no map over all rows is ever held."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlmcompress.methods.decoder.attention import DecoderAttention
from vlmcompress.methods.decoder.base import DecoderState

#: Weights held at a time, all samples and heads together (32 MiB of them).
_AT_A_TIME = 2**23


def packed(asked: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that a mask names, one after the other.

    Args:
        asked: [B, L] bool.

    Returns:
        [B, r] rows, ascending in each sample, r the most that any sample names; and [B, r] bool,
        which of them are named (the others are some other rows).
    """
    most = int(asked.sum(1).max()) if asked.numel() else 0
    rows = (~asked).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return rows, asked.gather(1, rows)


def in_blocks(
    attention: DecoderAttention, rows: Tensor, at_a_time: int = _AT_A_TIME
) -> Iterator[tuple[slice, Tensor]]:
    """Softmax rows of many queries, some of them at a time.

    Args:
        attention: of the layer.
        rows: [B, r].
        at_a_time: weights of one block, at least those of one query.

    Yields:
        Which of the `rows`, and their weights [B, heads, some, L].
    """
    b, heads, length, _ = attention.q.shape
    step = max(1, at_a_time // (b * heads * length))
    for start in range(0, rows.shape[1], step):
        block = slice(start, start + step)
        yield block, attention.weights(rows[:, block])


def received(state: DecoderState, asked: Tensor) -> Tensor:
    """What rows receive from others, by the head that gives them most: [B, L] float32.

    Args:
        state: with the attention that was read.
        asked: [B, L] bool, rows whose attention is summed up after the maximum over heads.
    """
    rows, there = packed(asked)
    total = torch.zeros(asked.shape, device=asked.device)
    for block, weights in in_blocks(state.attended(), rows):
        total += (weights.amax(1) * there[:, block, None]).sum(1)
    return total


def strongest(state: DecoderState, asked: Tensor) -> Tensor:
    """The most that any head of any asked row pays each row: [B, L] float32, 0 where none asks."""
    rows, there = packed(asked)
    most = torch.zeros(asked.shape, device=asked.device)
    for block, weights in in_blocks(state.attended(), rows):
        most = torch.maximum(most, (weights.amax(1) * there[:, block, None]).amax(1))
    return most


def mean_over_heads(state: DecoderState, rows: Tensor) -> Tensor:
    """[B, r, L] attention of some rows ([B, r]), averaged over heads."""
    found = [weights.mean(1) for _, weights in in_blocks(state.attended(), rows)]
    return torch.cat(found, 1)
