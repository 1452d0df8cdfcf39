"""How many patches are left after each of some steps, when their final number is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from vlmcompress.core.errors import ConfigError


def linear(n: int, k: int, steps: int, inflection: float = 0.0) -> list[int]:
    """Patches left after each step when about as many go at every step.

    Args:
        n: patches before.
        k: patches after the last step.
        steps: how many steps, at least 1.
        inflection: -1 removes twice the mean at first and nothing at last, 1 the other way round,
            0 the same number always (ToMe, arXiv 2210.09461, §4.1).
    """
    shares = [1 - inflection + 2 * inflection * i / max(1, steps - 1) for i in range(steps)]
    if steps == 1:
        shares = [1.0]
    total, gone, left = math.fsum(shares), 0.0, []
    for share in shares:
        gone += share
        left.append(n - math.floor((n - k) * gone / total + 0.5))
    return [*left[:-1], k]


def geometric(n: int, k: int, steps: int) -> list[int]:
    """Patches left after each step when the same share stays at every step."""
    left = [math.floor(n * (k / n) ** ((i + 1) / steps) + 0.5) for i in range(steps)]
    return [*left[:-1], k]


def repeated(n: int, steps: int, after: Callable[[int], int]) -> list[int]:
    """Patches left after each step when one step leaves `after(n)` of n."""
    return list(accumulate(range(steps), lambda now, _: after(now), initial=n))[1:]


def removals(depth: int, r: int | Sequence[int], inflection: float = 0.0) -> list[int]:
    """Tokens merged in each of `depth` layers, as ToMe's released code reads its argument.

    Args:
        depth: number of layers.
        r: the same in every layer, or one number per layer, filled up with 0.
        inflection: linear from r (1 - inflection) to 2 r minus that, truncated to whole tokens.
    """
    if not isinstance(r, int):
        return [*r, *[0] * (depth - len(r))]
    first = int(r * (1 - inflection))
    step = (2 * r - 2 * first) / max(1, depth - 1)
    return [int(first + step * i) for i in range(depth)]


def halving(method: str, n: int, plan: Sequence[int]) -> list[int]:
    """`plan` bent so that no step removes more than half, with the same number at the end.

    Raises:
        ConfigError: when that many cannot go in so few steps.
    """
    k, steps = plan[-1], len(plan)
    if n > k << steps:
        least = -(-n // (1 << steps))
        raise ConfigError(
            f"{method} merges at most half of the tokens of a layer; in {steps} layer(s) {n} "
            f"patches come down to {least}, not {k}. Keep more or name more layers."
        )
    left, now = [], n
    for step, wanted in enumerate(plan, 1):
        now = max(min(now, wanted, k << (steps - step)), now - now // 2)
        left.append(now)
    return left


def at_layers(n: int, layers: Sequence[int], left: Sequence[int], count: int) -> tuple[int, ...]:
    """Patches left after each of `count` layers, from those left after some of them."""
    after, now = dict(zip(layers, left, strict=True)), n
    spread = []
    for layer in range(count):
        now = after.get(layer, now)
        spread.append(now)
    return tuple(spread)
