"""A reduced tower written out: one image at a time, loops, no line of the seam or of a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
        received: [n] attention, averaged over heads and queries.
    """

    x: Tensor
    members: list[list[int]]
    source: list[int]
    keys: Tensor | None = None
    cls: Tensor | None = None
    received: Tensor | None = None

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
    model: Any, pixels: Tensor, rule: Rule, plan: Sequence[int], *, weighed: bool, place: str
) -> list[Rows]:
    """What leaves the tower of each image, patches only, in raster order.

    Args:
        model: unpatched.
        pixels: [b, 3, h, w].
        rule: (layer, rows, patches left) to rows.
        plan: patches left after each layer that is read.
        weighed: whether log(members) is added to the logits of keys.
        place: of the reduction: `before` a block, `between` its halves, or `after`.
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
            rows = _block(layers[layer], layer, rows, rule, left, cls, weighed, place)
        order = sorted(range(cls, len(rows.x)), key=lambda i: rows.source[i])
        last = model.config.model_type == "paligemma"  # reads behind the tower's last norm
        x = module.post_layernorm(rows.x) if last else rows.x
        members, source = ([values[i] for i in order] for values in (rows.members, rows.source))
        finished.append(Rows(x[order], members, source))
    return finished


def _block(
    block: Any, layer: int, rows: Rows, rule: Rule, left: int, cls: int, weighed: bool, place: str
) -> Rows:
    act = left != len(rows.x) - cls  # some bring patches back
    seen, mixed = _attend(block, rows, weighed)
    if act and place == "before":
        rows = rule(layer, seen, left)
        seen, mixed = _attend(block, rows, weighed)
    rows = replace(seen, x=rows.x + block.self_attn.out_proj(mixed))
    if act and place == "between":
        rows = rule(layer, rows, left)
    rows = replace(rows, x=rows.x + block.mlp(block.layer_norm2(rows.x)))
    return rule(layer, rows, left) if act and place == "after" else rows


def _attend(block: Any, rows: Rows, weighed: bool) -> tuple[Rows, Tensor]:
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
    received = weights.mean((0, 1))
    return replace(rows, keys=k.mean(1), cls=weights[:, 0].mean(0), received=received), mixed


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


def mctf(cls: int) -> Rule:
    """Half of the pairs join from even to odd rows, the others from odd to what is left."""

    def rule(layer: int, rows: Rows, left: int) -> Rows:
        n = len(rows.x)
        information, size = 1 / rows.received, 1 / rows.weights()
        information, size = information / information.max(), size / size.max()

        def weight(i: int, j: int) -> float:
            similar = (float(cosine_similarity(rows.x[i], rows.x[j], 0)) + 1) / 2
            both = float(information[i] * information[j]) ** (1 / 20)
            return similar * both * float(size[i] * size[j]) ** (1 / 40)

        even, odd = list(range(cls * 2, n, 2)), list(range(1, n, 2))
        pair = {(i, j): weight(i, j) for i in even for j in odd}
        joined: dict[int, int] = {}
        r = n - cls - left
        first = {i: max(odd, key=lambda j: pair[i, j]) for i in even}
        for i in sorted(even, key=lambda i: -pair[i, first[i]])[: r // 2]:
            joined[i] = first[i]
        rest = [i for i in even if i not in joined]
        back = {j: max(rest, key=lambda i: pair[i, j]) for j in odd}
        ranking = sorted(odd, key=lambda j: -pair[back[j], j])
        joined |= {j: back[j] for j in ranking[: r - r // 2]}

        def root(i: int) -> int:
            return root(joined[i]) if i in joined else i

        stay = [*range(cls), *rest, *ranking[r - r // 2 :]]
        groups = [[i for i in range(n) if i != s and root(i) == s] + [s] for s in stay]
        w = rows.received * rows.weights()
        x = [sum(w[i] * rows.x[i] for i in g) / sum(w[i] for i in g) for g in groups]
        return rows.take(groups, torch.stack(x))

    return rule
