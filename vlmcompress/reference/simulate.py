"""Image tokens as a good tower would make them, without a tower: food for the language model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .codes import Codes
from .labels import BLANK
from .scenes import COLOUR_NAMES
from .sprites import SHAPES
from .worlds import MOST_ITEMS

_CLASSES = {"colour": len(COLOUR_NAMES), "shape": len(SHAPES), "glyph": BLANK + 1}
_DOUBT = {"colour": 0.1, "shape": 0.3, "glyph": 0.4}  # how unsure the tower may be of an attribute


def _mixes(labels: dict[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
    """Attribute words per patch, some of them blurred towards another class."""
    b, n = labels["item"].shape
    mixes = {}
    for kind, classes in _CLASSES.items():
        shown = labels[kind] >= 0
        hot = F.one_hot(labels[kind].clamp(min=0), classes).float() * shown[..., None]
        other = torch.rand(b, MOST_ITEMS, classes, generator=draw).square()
        other = (other / other.sum(-1, keepdim=True)).gather(
            1, labels["item"].clamp(min=0)[..., None].expand(b, n, classes)
        )
        doubt = _DOUBT[kind] * torch.rand(b, MOST_ITEMS, generator=draw)
        doubt = doubt.gather(1, labels["item"].clamp(min=0))[..., None] * shown[..., None]
        mixes[kind] = hot * (1 - doubt) + other * doubt
    return mixes


def simulate_tokens(
    codes: Codes,
    embedding: Tensor,
    labels: dict[str, Tensor],
    draw: torch.Generator,
    noise: float = 0.5,
) -> Tensor:
    """Simulate projected tokens of all patches.

    Args:
        codes: the code that tower and language model share.
        embedding: word embedding ``[vocabulary, width]``.
        labels: stacked patch labels ``[b, 196, ...]``, on the CPU.
        draw: source of randomness (CPU).
        noise: standard deviation of the gaussian residual; tokens have unit scale.

    Returns:
        ``[b, 196, width]``.
    """
    on = labels["item"] >= 0
    shaky = 0.06 * torch.randn(on.shape[0], MOST_ITEMS, 2, generator=draw)
    shift = shaky.gather(1, labels["item"].clamp(min=0)[..., None].expand(*on.shape, 2))
    where = labels["where"] + shift * on[..., None]
    device = embedding.device
    tokens = codes.encode(
        embedding,
        where.to(device),
        labels["centre"].float().to(device),
        {kind: mix.to(device) for kind, mix in _mixes(labels, draw).items()},
        (~on).float().to(device),
    )
    residual = torch.randn(tokens.shape, generator=draw).to(device)
    level = noise * torch.rand(tokens.shape[0], 1, 1, generator=draw).to(device)
    return tokens + level * residual
