"""Pseudo-random numbers without state: the same on every device, for every batch size."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 31
_MASK = (1 << _BITS) - 1


def hashed(seed: int, n: int, device: torch.device) -> Tensor:
    """A pseudo-random number for each of `range(n)`, a function of (seed, i) alone.

    A counter is scrambled three times by a multiply-xorshift mixer (the shape and constants of
    MurmurHash3's finaliser, on 31 bits so that products fit int64), with the low and the high 31
    bits of the seed mixed in between. Every step is a bijection, so that no two counters collide.

    Args:
        seed: any int; its low 62 bits count.
        n: how many, at most 2^31.
        device: where the numbers are computed.

    Returns:
        [n] int64, distinct, in [0, 2^31).
    """
    return hashed_at(seed, torch.arange(n, device=device))


def hashed_at(seed: int, counters: Tensor) -> Tensor:
    """The numbers that `hashed` gives some counters (int64, below 2^31), in their shape."""
    state = _mix((counters + 0x1E3779B9) & _MASK)
    for word in (seed & _MASK, (seed >> _BITS) & _MASK):
        state = _mix(state ^ word)
    return state


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
