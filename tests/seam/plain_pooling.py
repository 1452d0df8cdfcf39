"""Vote&Mix, HVT and token clustering written out: rules for `plain_tower.run`, in loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.seam.plain_tower import Rows, Rule


def vomix(cls: int) -> Rule:
    """Who gets most votes is spread over all others."""

    def rule(layer: int, rows: Rows, left: int) -> Rows:
        keys = rows.keys[cls:]
        n = len(keys)
        similar = torch.stack([cosine_similarity(key[None], keys) for key in keys])
        votes = [0.0] * n
        for i in range(n):
            j = max((j for j in range(n) if j != i), key=lambda j: float(similar[i, j]))
            votes[j] += float(similar[i, j])
        order = sorted(range(n), key=lambda i: -votes[i])
        gone, stay = order[: n - left], sorted(order[n - left :])
        x, total = {i: rows.x[cls + i] for i in stay}, dict.fromkeys(stay, 1.0)
        for s in gone:
            shares = similar[s, stay].softmax(0)
            for i, share in zip(stay, shares, strict=True):
                x[i] = x[i] + share * rows.x[cls + s]
                total[i] += float(share)
        to = {s: max(stay, key=lambda i: float(similar[s, i])) for s in gone}
        groups = [[i] for i in range(cls)]
        groups += [[cls + s for s in gone if to[s] == i] + [cls + i] for i in stay]
        mixed = torch.stack([*rows.x[:cls], *(x[i] / total[i] for i in stay)])
        return rows.take(groups, mixed)

    return rule


def hvt(cls: int) -> Rule:
    """The largest of each window, channel by channel."""

    def rule(layer: int, rows: Rows, left: int) -> Rows:
        n = len(rows.x) - cls
        windows = [range(i * n // left, math.ceil((i + 1) * n / left)) for i in range(left)]
        middle = [(w.start + w.stop - 1) // 2 for w in windows]
        owner = {p: i for i, w in enumerate(windows) for p in w}
        owner |= {p: i for i, p in enumerate(middle)}
        x = [rows.x[cls + w.start : cls + w.stop].max(0).values for w in windows]
        groups = [[i] for i in range(cls)]
        for i, named in enumerate(middle):
            mine = [cls + p for p in range(n) if owner[p] == i and p != named]
            groups.append([*mine, cls + named])
        return rows.take(groups, torch.stack([*rows.x[:cls], *x]))

    return rule


def token_clustering(cls: int) -> Rule:
    """Soft clusters on a grid of three by three; patches are made again when more are asked for."""
    first: list[Tensor] = []  # of one image at a time: what its patches were, and its centres

    def rule(layer: int, rows: Rows, left: int) -> Rows:
        if left == 25:
            return again(rows)
        assert left == 9
        x, side = rows.x[cls:], 5
        places = [(r, c) for r in range(side) for c in range(side)]
        cells = [(i, j) for i in range(3) for j in range(3)]
        spans = [range(0, 2), range(1, 4), range(3, 5)]  # a third of five, with what it touches
        centres = [
            torch.stack([x[r * side + c] for r in spans[i] for c in spans[j]]).mean(0)
            for i, j in cells
        ]
        own = [cells.index((r * 3 // side, c * 3 // side)) for r, c in places]
        scatter = sum((x[p] - centres[own[p]]).square().sum() for p in range(25)) / 25
        for _ in range(5):
            pull = _pull(x, centres, 0.1 * scatter)  # all nine cells lie in a window of five
            shares = pull.softmax(1)
            centres = [(shares[:, k, None] * x).sum(0) / shares[:, k].sum() for k in range(9)]
        first[:] = [_pull(x, centres, 0.1 * scatter)]
        named = [r * side + c for r in (0, 2, 4) for c in (0, 2, 4)]
        owner = first[0].argmax(1).tolist()
        groups = [[i] for i in range(cls)]
        for k, p in enumerate(named):
            mine = [q for q in range(25) if owner[q] == k and q not in named]
            groups.append([cls + q for q in [*mine, p]])
        return rows.take(groups, torch.stack([*rows.x[:cls], *centres]))

    def again(rows: Rows) -> Rows:
        (pull,) = first
        refined = rows.x[cls:]
        made = [pull[p].softmax(0) @ refined for p in range(25)]
        x = torch.stack([*rows.x[:cls], *made])
        return Rows(x, [[]] * cls + [[p] for p in range(25)], [-1] * cls + list(range(25)))

    return rule


def _pull(x: Tensor, centres: list[Tensor], temperature: Tensor) -> Tensor:
    far = torch.stack([(x - centre).square().sum(1) for centre in centres], 1)
    return -far / temperature
