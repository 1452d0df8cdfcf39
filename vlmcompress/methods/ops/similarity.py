"""How alike the states of consecutive layers are, and from which layer on that counts."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmcompress.methods.options import Layer, check_number, resolve_layer


def agreement(before: Tensor, after: Tensor) -> Tensor:
    """Cosine similarity of states, in float32.

    Args:
        before: [B, d] states, or [B, n, d] of several rows, over which the mean is taken.
        after: the same.

    Returns:
        [B] in [-1, 1].
    """
    similar = cosine_similarity(before.detach().float(), after.detach().float(), dim=-1)
    return similar if similar.ndim == 1 else similar.flatten(1).mean(1)


def check_exit(method: str, threshold: object, first: Layer) -> None:
    """Check the options of an early exit.

    Raises:
        ConfigTypeError, ConfigError: for values that make no sense.
    """
    check_number(method, "threshold", threshold, -1, 2)
    first_exit(first, None)


def first_exit(first: Layer, depth: int | None) -> int:
    """Absolute index of the earliest layer behind which rows may leave.

    Args:
        first: as an option.
        depth: layers; None checks only what can be known without it.

    Raises:
        ConfigTypeError, ConfigError: for a layer that does not exist.
    """
    if depth is None:
        depth = abs(first) + 1 if isinstance(first, int) else 1
    return resolve_layer(first, depth)
