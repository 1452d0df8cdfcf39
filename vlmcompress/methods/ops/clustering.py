"""Local soft clusters of a map, and its places made again of them (arXiv 2210.01035, §3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vlmcompress.methods.ops.topk import descending


def local_clusters(
    x: Tensor, grid: tuple[int, int], *, window: int, iterations: int, temperature: float | Tensor
) -> Tensor:
    """Centres of clusters of neighbouring places: [b, rows * columns, c] float32.

    They begin as the means of the cells of a grid. In turn every place is drawn to the centres of
    the window of cells around its own, by the softmax of its squared distances, and every centre
    becomes the mean of the places drawn to it. One that nothing is drawn to stays where it was.
    Gradients reach the places through the means, not through who is drawn where.

    Args:
        x: [b, c, height, width] float32.
        grid: (rows, columns) of cells.
        window: cells either way, an odd number, that a place may be drawn to.
        iterations: how often places choose and centres follow.
        temperature: that squared distances are divided by, of all images or [b, 1, 1].
    """
    places = x.flatten(2).transpose(1, 2)
    near = _near((x.shape[2], x.shape[3]), grid, window, x.device)
    with torch.autocast(x.device.type, enabled=False):
        centres = adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)
        for _ in range(iterations):
            with torch.no_grad():
                logits = -squared_distances(places, centres) / temperature
                share = logits.masked_fill(~near, -torch.inf).softmax(2).transpose(1, 2)
                total = share.sum(2, keepdim=True)
                share = share / total.clamp(min=torch.finfo(total.dtype).tiny)
            centres = torch.where(total > 0, share @ places, centres)
    return centres


@torch.no_grad()
def scatter_in_cells(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean squared distance of the places of an image to the means of their cells: [b].

    Args:
        x: [b, c, height, width] float32.
        grid: (rows, columns) of cells.
    """
    rows, columns = (
        torch.arange(length, device=x.device) * cells // length
        for length, cells in zip(x.shape[2:], grid, strict=True)
    )
    means = adaptive_avg_pool2d(x, grid)[:, :, rows[:, None], columns]
    return (x - means).square().sum(1).mean((1, 2))


def squared_distances(places: Tensor, centres: Tensor) -> Tensor:
    """[b, n, k] between places ([b, n, c]) and centres ([b, k, c])."""
    # Far from the origin, differences of squares would drown in rounding.
    middle = places.mean(1, keepdim=True)
    places, centres = places - middle, centres - middle
    both = places.square().sum(2)[:, :, None] + centres.square().sum(2)[:, None]
    return (both - 2 * places @ centres.transpose(1, 2)).clamp(min=0)


def nearest_weights(
    distances: Tensor,
    neighbours: int,
    temperature: float | Tensor,
    *,
    unit_length: bool = False,
) -> Tensor:
    """Weights of the nearest centres of each place, 0 for the others: [b, n, k].

    Args:
        distances: [b, n, k] squared.
        neighbours: how many centres a place is made of; ties go to the lower one.
        temperature: that squared distances are divided by, of all images or [b, 1, 1].
        unit_length: whether a place's weights have the Euclidean length 1 instead of the sum 1.
    """
    near = descending(-distances)[:, :, :neighbours]
    logits = -distances.gather(2, near) / temperature
    weights = logits.softmax(2)
    if unit_length:
        weights = weights / weights.norm(dim=2, keepdim=True)
    return torch.zeros_like(distances).scatter_(2, near, weights)


def _near(
    size: tuple[int, int], grid: tuple[int, int], window: int, device: torch.device
) -> Tensor:
    """[n, k] whether a cell lies in the window around the cell of a place."""

    def along(length: int, cells: int) -> Tensor:
        own = torch.arange(length, device=device) * cells // length
        return (own[:, None] - torch.arange(cells, device=device)).abs() <= window // 2

    rows, columns = (along(length, cells) for length, cells in zip(size, grid, strict=True))
    return (rows[:, None, :, None] & columns[None, :, None]).flatten(0, 1).flatten(1)
