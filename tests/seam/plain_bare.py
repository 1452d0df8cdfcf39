"""A reduced vision transformer of any library written out, with no line of the seam or of a method.

Heads are not written out: the model's own reads a sequence in which every row stands as often as
the patches that became part of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.seam import plain_learned
from tests.seam.bare_models import embed
from tests.seam.plain_tower import Rows, Rule


@dataclass
class Parts:
    """The parts of a block: norms, projections to q, k and v, output, scales and MLP."""

    first: Any
    qkv: Any
    out: Any
    second: Any
    mlp: Any
    scales: tuple[Any, Any] = (lambda x: x, lambda x: x)


def blocks(model: Any) -> Sequence[Any]:
    """The blocks of the image tower."""
    for attribute in ("vision_model", "visual", "dinov2", "dinov2_with_registers", "vit", "trunk"):
        model = getattr(model, attribute, model)
    if hasattr(model, "transformer"):
        return model.transformer.resblocks
    model = getattr(model, "encoder", model)
    names = ("blocks", "layers", "layer")
    return next(getattr(model, name) for name in names if hasattr(model, name))


def prefix(model: Any) -> tuple[int, int]:
    """Whether there is a [CLS] row, and rows between it and the patches."""
    for name, cls in (("Siglip", 0), ("CLIPV", 1), ("CLIPM", 1), ("CLIPF", 1), ("ViT", 1)):
        if type(model).__name__.startswith(name):
            return cls, 0
    if hasattr(model, "config"):
        return 1, getattr(model.config, "num_register_tokens", 0)
    trunk = getattr(getattr(model, "visual", model), "trunk", model)
    if hasattr(trunk, "num_prefix_tokens"):
        cls = int(trunk.cls_token is not None)
        return cls, trunk.num_prefix_tokens - cls
    return 1, 0


def parts(block: Any) -> Parts:
    """Those of a block of any library."""
    if hasattr(block, "ln_1"):
        inner = block.attn

        def inside(x: Tensor) -> Tensor:
            return (inner.in_proj_weight @ x.T).T + inner.in_proj_bias

        scales = (block.ls_1, block.ls_2)
        qkv = _normed(inside, getattr(inner, "ln_q", None), getattr(inner, "ln_k", None))
        return Parts(block.ln_1, qkv, inner.out_proj, block.ln_2, block.mlp, scales)
    if hasattr(block, "attn"):
        inner = block.attn
        qkv = _normed(inner.qkv, inner.q_norm, inner.k_norm)
        return Parts(block.norm1, qkv, inner.proj, block.norm2, block.mlp, (block.ls1, block.ls2))
    inner = getattr(block, "self_attn", None) or block.attention
    first = next(getattr(block, n) for n in _FIRST if hasattr(block, n))
    second = next(getattr(block, n) for n in _SECOND if hasattr(block, n))

    def apart(x: Tensor, heads: int) -> list[Tensor]:
        made = (getattr(inner, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        return [y.view(len(x), heads, -1) for y in made]

    out = getattr(inner, "out_proj", None) or inner.o_proj
    scaled = hasattr(block, "layer_scale1")
    scales = (block.layer_scale1, block.layer_scale2) if scaled else (lambda x: x, lambda x: x)
    return Parts(first, apart, out, second, block.mlp, scales)


_FIRST = ("layer_norm1", "norm1", "layernorm_before")
_SECOND = ("layer_norm2", "norm2", "layernorm_after")


def _normed(project: Any, q_norm: Any, k_norm: Any) -> Any:
    def qkv(x: Tensor, heads: int) -> list[Tensor]:
        q, k, v = (y.view(len(x), heads, -1) for y in project(x).chunk(3, -1))
        return [q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k), v]

    return qkv


def run(
    model: Any,
    images: Tensor,
    rule: Rule,
    plan: Sequence[int],
    *,
    heads: int,
    weighed: bool,
    place: str,
) -> list[tuple[Tensor, Rows]]:
    """Embedding and final rows (in raster order) of every image.

    Args:
        model: unpatched.
        images: [b, 3, h, w].
        rule: (layer, rows, patches left) to rows.
        plan: patches left after each layer.
        heads: of the attention.
        weighed: whether log(members) is added to the logits of keys.
        place: of the reduction: `before` a block, `between` its halves or `after` it.
    """
    cls, registers = prefix(model)
    finished = []
    for image in images.split(1):
        first = _first(model, image)
        fixed = first[cls : cls + registers]
        x = torch.cat([first[:cls], first[cls + registers :]])
        n = len(x) - cls
        rows = Rows(x, [[]] * cls + [[i] for i in range(n)], [-1] * cls + list(range(n)))
        for layer, (block, left) in enumerate(zip(blocks(model), plan, strict=True)):
            p, act = parts(block), left < len(rows.x) - cls
            if act and place == "before":
                seen, _ = _attend(p, rows, fixed, heads, weighed)
                rows = rule(layer, replace(seen, x=rows.x), left)
            rows, fixed = _attend(p, rows, fixed, heads, weighed)
            if act and place == "between":
                rows = rule(layer, rows, left)
            both = torch.cat([rows.x, fixed])
            both = both + p.scales[1](p.mlp(p.second(both)))
            rows, fixed = replace(rows, x=both[: len(rows.x)]), both[len(rows.x) :]
            if act and place == "after":
                rows = rule(layer, rows, left)
        order = sorted(range(cls, len(rows.x)), key=lambda i: rows.source[i])
        often = [i for i in order for _ in rows.members[i]]
        sequence = torch.cat([rows.x[:cls], fixed, rows.x[often]])
        members, source = ([values[i] for i in order] for values in (rows.members, rows.source))
        done = Rows(rows.x[order], members, source)
        finished.append((_head(model, image, sequence), done))
    return finished


def sparse(
    model: Any, images: Tensor, weights: Mapping[str, Tensor], keys: int, *, heads: int
) -> Tensor:
    """Embeddings of images by a tower whose queries look at `keys` keys.

    Args:
        model: unpatched, without registers.
        images: [b, 3, h, w].
        weights: state dict of Sparsifiner's predictors.
        keys: of every query but that of [CLS].
        heads: of the attention.
    """
    cls, _ = prefix(model)
    made = []
    for image in images.split(1):
        x = _first(model, image)
        for layer, block in enumerate(blocks(model)):
            p = parts(block)
            q, k, v = (part[None] for part in p.qkv(p.first(x), heads))
            mixed = plain_learned.connected(q, k, v, weights, layer, keys, cls)[0]
            x = x + p.scales[0](p.out(mixed))
            x = x + p.scales[1](p.mlp(p.second(x)))
        made.append(_head(model, image, x))
    return torch.stack(made)


def _first(model: Any, image: Tensor) -> Tensor:
    """What the first block is given: [n, d]."""
    seen: list[Tensor] = []
    handle = blocks(model)[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    embed(model, image)
    handle.remove()
    return seen[0].flatten(0, 1)  # one image: [1, n, d] or [n, 1, d]


def _head(model: Any, image: Tensor, rows: Tensor) -> Tensor:
    """What the model makes of rows ([n, d]) that its last block gives: [e]."""

    def answer(module: Any, args: Any, output: Tensor) -> Tensor:
        return rows[None] if len(output) == 1 else rows[:, None]

    handle = blocks(model)[-1].register_forward_hook(answer)
    result = embed(model, image)[0]
    handle.remove()
    return result


def _attend(p: Parts, rows: Rows, fixed: Tensor, heads: int, weighed: bool) -> tuple[Rows, Tensor]:
    """Rows and registers after the attention; what rules look at, without registers."""
    n, both = len(rows.x), torch.cat([rows.x, fixed])
    q, k, v = p.qkv(p.first(both), heads)
    logits = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    if weighed:
        logits = logits + torch.cat([rows.weights(), torch.ones(len(fixed))]).log()
    weights = logits.softmax(-1)
    mixed = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
    both = both + p.scales[0](p.out(mixed))
    weights = weights[:, :n, :n]
    return (
        replace(
            rows,
            x=both[:n],
            keys=k[:n].mean(1),
            cls=weights[:, 0].mean(0),
            received=weights.mean((0, 1)),
        ),
        both[n:],
    )
