"""A reduced tower written out: one image at a time, loops, no line of the seam or of a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmcompress.families import family_of


@dataclass
class Rows:
    """Tokens of one image between two steps.

    Attributes:
        x: [n, d]. members: patches in each row; empty for [CLS]. source: the patch that names it.
        keys: [n, head_dim] of the block, averaged over heads. cls: [n] attention of row 0.
    """

    x: Tensor
    members: list[list[int]]
    source: list[int]
    keys: Tensor | None = None
    cls: Tensor | None = None

    def weights(self) -> Tensor:
        """How many patches each row stands for."""
        return torch.tensor([float(max(1, len(m))) for m in self.members])

    def take(self, groups: Sequence[Sequence[int]], x: Tensor | None = None) -> Rows:
        """Groups of rows, each named by its last; `x` or weighted means."""
        w = self.weights()
        means = [sum(w[i] * self.x[i] for i in g) / sum(w[i] for i in g) for g in groups]
        members = [sorted(p for i in g for p in self.members[i]) for g in groups]
        return Rows(
            torch.stack(means) if x is None else x, members, [self.source[g[-1]] for g in groups]
        )


Rule = Callable[[int, Rows, int], Rows]


def run(
    model: Any, pixels: Tensor, rule: Rule, plan: Sequence[int], *, weighed: bool, after: bool
) -> list[Rows]:
    """What leaves the tower of each image, patches only, in raster order.

    Args:
        model: unpatched.
        pixels: [b, 3, h, w].
        rule: (layer, rows, patches left) to rows.
        plan: patches left after each layer that is read.
        weighed: whether log(members) is added to the logits of keys.
        after: whether rows are reduced after the block instead of before its MLP.
    """
    family, base = family_of(model), model.base_model
    module, tower = family.tower_module(base), family.tower(base)
    layers = tower.layers(module)
    first = module(pixels, output_hidden_states=True).hidden_states[0]
    finished = []
    for x in first:
        cls = int(tower.has_cls)
        n = len(x) - cls
        rows = Rows(x, [[]] * cls + [[i] for i in range(n)], [-1] * cls + list(range(n)))
        for layer, left in enumerate(plan):
            rows = _block(layers[layer], layer, rows, rule, left, cls, weighed, after)
        order = sorted(range(cls, len(rows.x)), key=lambda i: rows.source[i])
        last = model.config.model_type == "paligemma"  # reads behind the tower's last norm
        x = module.post_layernorm(rows.x) if last else rows.x
        members, source = ([values[i] for i in order] for values in (rows.members, rows.source))
        finished.append(Rows(x[order], members, source))
    return finished


def _block(
    block: Any, layer: int, rows: Rows, rule: Rule, left: int, cls: int, weighed: bool, after: bool
) -> Rows:
    attention, heads = block.self_attn, block.self_attn.num_heads
    normed = block.layer_norm1(rows.x)
    q, k, v = (
        getattr(attention, name)(normed).view(len(normed), heads, -1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    logits = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    if weighed:
        logits = logits + rows.weights().log()
    weights = logits.softmax(-1)
    mixed = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
    x = rows.x + attention.out_proj(mixed)
    keys, row = k.mean(1), weights[:, 0].mean(0)
    rows = Rows(x, rows.members, rows.source, keys, row)
    act = left < len(rows.x) - cls
    if act and not after:
        rows = rule(layer, rows, left)
    x = rows.x + block.mlp(block.layer_norm2(rows.x))
    rows = Rows(x, rows.members, rows.source, rows.keys, rows.cls)
    return rule(layer, rows, left) if act and after else rows


def tome(cls: int) -> Rule:
    """Even rows join odd rows."""

    def rule(layer: int, rows: Rows, left: int) -> Rows:
        n = len(rows.x)
        even, odd = list(range(0, n, 2)), list(range(1, n, 2))
        best = []
        for i in even[cls:]:
            similar = [float(cosine_similarity(rows.keys[i], rows.keys[j], 0)) for j in odd]
            j = max(range(len(odd)), key=lambda j: similar[j])
            best.append((-similar[j], i, odd[j]))
        best.sort()
        joined = {i: j for _, i, j in best[: n - cls - left]}
        stay = [i for _, i, _ in best[n - cls - left :]]
        stay = [0, *sorted(stay)] if cls else stay
        groups = [[i] for i in stay] + [[i for i in joined if joined[i] == j] + [j] for j in odd]
        return rows.take(groups)

    return rule


def evit(layer: int, rows: Rows, left: int) -> Rows:
    """The most attended stay, the others are one row."""
    order = sorted(range(1, len(rows.x)), key=lambda i: -float(rows.cls[i]))
    kept, rest = order[: left - 1], order[left - 1 :]
    fused = sum(rows.cls[i] * rows.x[i] for i in rest)
    x = torch.stack([rows.x[0], *(rows.x[i] for i in kept), fused])
    return rows.take([[0], *([i] for i in kept), [*rest[1:], rest[0]]], x)


def pitome(margin: float, depth: int, cls: int) -> Rule:
    """The rows of highest energy join each other."""

    def rule(layer: int, rows: Rows, left: int) -> Rows:
        keys = rows.keys[cls:]
        n, m = len(keys), margin * (1 - layer / depth)
        similar = torch.stack([cosine_similarity(key[None], keys) for key in keys])
        elu = torch.where(similar > m, similar - m, (similar - m).exp() - 1)
        ranking = sorted(range(n), key=lambda i: -float(elu[i].mean()))
        r = n - left
        sources, targets, stay = ranking[: 2 * r : 2], ranking[1 : 2 * r : 2], ranking[2 * r :]
        joined = {i: max(targets, key=lambda j: float(similar[i, j])) for i in sources}
        groups = [[i] for i in range(cls)] + [[i + cls] for i in stay]
        groups += [[i + cls for i in joined if joined[i] == j] + [j + cls] for j in targets]
        return rows.take(groups)

    return rule
