"""Integer shares of a budget."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(total: int, weights: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Split a budget in proportion to weights, exactly, with no share above its limit.

    Largest remainders, ties to the first. What a full share cannot take goes to the others, in
    proportion to their weights; where all weights are 0, in proportion to the limits.

    Args:
        total: what is split, at most the sum of the limits.
        weights: non-negative, one per share.
        limits: one per share.
    """
    shares = [0] * len(limits)
    while (left := total - sum(shares)) > 0:
        room = [limit - share for limit, share in zip(limits, shares, strict=True)]
        pull = [w if r else 0.0 for w, r in zip(weights, room, strict=True)]
        if not any(pull):
            pull = [float(r) for r in room]
        exact = [left * p / sum(pull) for p in pull]
        step = [min(int(e), r) for e, r in zip(exact, room, strict=True)]
        by_remainder = sorted(range(len(exact)), key=lambda i: int(exact[i]) - exact[i])
        open_still = [i for i in by_remainder if pull[i] and step[i] < room[i]]
        for i in open_still[: left - sum(step)]:
            step[i] += 1
        shares = [s + d for s, d in zip(shares, step, strict=True)]
    return shares


def at_least_one(shares: Sequence[int]) -> list[int]:
    """Shares none of which is 0: what is missing is taken from the largest, ties from the first.

    Args:
        shares: that sum up to at least their number.
    """
    raised = list(shares)
    while 0 in raised:
        raised[raised.index(max(raised))] -= 1
        raised[raised.index(0)] += 1
    return raised
