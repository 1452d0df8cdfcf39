"""Towers of T2T, SiT and Sparsifiner written out: loops, no line of the seam or of a method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.seam.plain_tower import Rows, Rule
from vlmcompress.families import family_of


def shake(parts: Any, seed: int = 0) -> None:
    """Other numbers than untrained ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def t2t(cls: int, side: int, stride: tuple[int, int], overlap: int) -> Rule:
    """Means of windows; a patch is counted for the window whose stride it lies in."""

    def rule(layer: int, rows: Rows, left: int) -> Rows:
        before, groups, x = math.ceil(overlap / 2), [[i] for i in range(cls)], list(rows.x[:cls])
        for top in range(0, side, stride[0]):
            for start in range(0, side, stride[1]):
                ys = range(top - before, top - before + stride[0] + overlap)
                xs = range(start - before, start - before + stride[1] + overlap)
                inside = [y * side + x for y in ys for x in xs if 0 <= y < side and 0 <= x < side]
                x.append(torch.stack([rows.x[cls + place] for place in inside]).mean(0))
                own = [
                    (y, x)
                    for y in range(top, min(side, top + stride[0]))
                    for x in range(start, min(side, start + stride[1]))
                ]
                middle = tuple((min(p) + max(p)) // 2 for p in zip(*own, strict=True))
                own.sort(key=lambda place, middle=middle: place == middle)
                groups.append([cls + y * side + x for y, x in own])
        return rows.take(groups, torch.stack(x))

    return rule


def sit(cls: int, weights: Mapping[str, Tensor]) -> Rule:
    """Slots of `weights` (a state dict) take means; slot i stands at an evenly spaced patch."""

    def rule(layer: int, rows: Rows, left: int) -> Rows:
        own = _of_layer(weights, "slots", layer)
        patches = rows.x[cls:]
        normed = torch.nn.functional.layer_norm(
            patches, patches.shape[1:], own["norm.weight"], own["norm.bias"]
        )
        inner = torch.nn.functional.gelu(normed @ own["up.weight"].T + own["up.bias"])
        logits = (inner @ own["down.weight"].T + own["down.bias"]) * own["scale"]
        shares = logits.softmax(0)
        n = len(patches)
        places = [int((slot + 0.5) * n / left) for slot in range(left)]
        groups: list[list[int]] = [[] for _ in range(left)]
        for patch in range(n):
            if patch not in places:
                groups[int(shares[patch].argmax())].append(cls + patch)
        for slot, place in enumerate(places):
            groups[slot].append(cls + place)
        x = torch.cat([rows.x[:cls], shares.T @ patches])
        return rows.take([[i] for i in range(cls)] + groups, x)

    return rule


def sparse(model: Any, pixels: Tensor, weights: Mapping[str, Tensor], k: int, last: int) -> Tensor:
    """What leaves a tower whose queries look at `k` keys, patches only: [b, n, d].

    Args:
        model: unpatched.
        pixels: [b, 3, h, w].
        weights: state dict of the predictors.
        k: keys of every query but that of [CLS].
        last: the last layer that is read.
    """
    family, base = family_of(model), model.base_model
    module, tower = family.tower_module(base), family.tower(base)
    cls = int(tower.has_cls)
    x = module(pixels, output_hidden_states=True).hidden_states[0]
    for layer, block in enumerate(tower.layers(module)[: last + 1]):
        attention = block.self_attn
        normed = block.layer_norm1(x)
        heads = (*normed.shape[:2], attention.num_heads, -1)
        q, k_, v = (
            getattr(attention, name)(normed).view(heads) for name in ("q_proj", "k_proj", "v_proj")
        )
        x = x + attention.out_proj(connected(q, k_, v, weights, layer, k, cls))
        x = x + block.mlp(block.layer_norm2(x))
    if model.config.model_type == "paligemma":  # reads behind the tower's last norm
        x = module.post_layernorm(x)
    return x[:, cls:]


def connected(
    q: Tensor, k: Tensor, v: Tensor, weights: Mapping[str, Tensor], layer: int, keys: int, cls: int
) -> Tensor:
    """Attention of queries, keys and values ([b, n, heads, d]) over few keys: [b, n, heads * d]."""
    own = _of_layer(weights, "layers", layer)
    narrow_q = q @ own["query.weight"].T + own["query.bias"]
    narrow_k = k @ own["key.weight"].T + own["key.bias"]
    down = torch.einsum("rn,bnhd->brhd", own["down"], narrow_k)
    met = torch.einsum("bnhd,brhd->bhnr", narrow_q, down) / math.sqrt(q.shape[-1])
    estimates = met.softmax(-1) @ own["up"].abs()
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    order = estimates.argsort(dim=-1, descending=True, stable=True)
    hidden = order.argsort(-1) >= keys
    hidden[:, :, :cls] = False
    shares = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", shares, v).flatten(2)


def _of_layer(weights: Mapping[str, Tensor], kind: str, layer: int) -> dict[str, Tensor]:
    """The part of a state dict that belongs to a layer."""
    start = f"{kind}.{layer}."
    return {n.removeprefix(start): value for n, value in weights.items() if n.startswith(start)}
