"""What compressors with queries share: heads, sine positions, and what a query stands for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmcompress.methods.ops.grid import centres

_LONGEST = 10000.0  #: longest wavelength of sine positions, over 2 pi, as in transformers


def head_count(width: int, head_width: int) -> int:
    """Heads of at least `head_width` channels, as many as divide `width` evenly; at least one."""
    most = max(1, width // head_width)
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)


def heads_within(width: int, most: int) -> int:
    """The largest number of heads up to `most` that divides a width."""
    return next(heads for heads in range(min(most, width), 0, -1) if width % heads == 0)


def sine_places(size: tuple[int, int], table: tuple[int, int], width: int) -> Tensor:
    """Two-dimensional sine positions of a map, in the coordinates of a table: [h * w, width].

    Both cover the same image, so that a map of the table's own size has whole coordinates. The
    first half of the channels holds sines and cosines of the column, the second those of the row.

    Args:
        size: (height, width) of the map.
        table: (height, width) of the table.
        width: channels; those beyond a multiple of 4 are 0.
    """
    y, x = (
        (torch.arange(length) + 0.5) * side / length - 0.5
        for length, side in zip(size, table, strict=True)
    )
    rows, columns = _waves(y, width // 4), _waves(x, width // 4)
    both = (columns.expand(size[0], -1, -1), rows[:, None].expand(-1, size[1], -1))
    return pad(torch.cat(both, -1).flatten(0, 1), (0, width % 4))


def stand_for(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The token that stands for each query, [b, k], and the query of each token, [b, n].

    Queries see the whole map and have no place of their own. Query i stands at the i-th of k evenly
    spaced tokens in every image, so that rows keep their order; every token counts for the query
    that attends to it most, and the one at a query's place always for that query.

    Args:
        weights: [b, k, n] attention of each query to each token, k <= n.
    """
    b, k, n = weights.shape
    places = torch.tensor(centres(n, k), device=weights.device).expand(b, -1)
    own = torch.arange(k, device=weights.device).expand(b, -1)
    return places, weights.argmax(1).scatter(1, places, own)


def _waves(places: Tensor, count: int) -> Tensor:
    """[length, 2 * count] sines, then cosines, of places ([length]) at falling frequencies."""
    steps = torch.arange(count, dtype=torch.float32) / max(1, count)
    angles = places.float()[:, None] * _LONGEST**-steps
    return torch.cat([angles.sin(), angles.cos()], -1)
