"""Methods as the tests list them, and random units of visual tokens for them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods import TokenCompressor, create
from vlmcompress.methods.base import resolve_layer

DEPTH, HEADS, WIDTH = 12, 3, 8
QUICK = settings(max_examples=30, deadline=None)

Grid = tuple[int, int, int]
keeps = st.one_of(st.integers(1, 90), st.floats(0, 1, exclude_min=True))
seeds = st.integers(0, 99)
layouts = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=3
)


def make(name: str, options: dict[str, Any]) -> TokenCompressor:
    method = create(name, **options)
    assert isinstance(method, TokenCompressor)
    return method


def segments_of(layout: list[Grid]) -> tuple[Segment, ...]:
    kinds = ("base", "tile", "frame")
    segments, start = [], 0
    for i, grid in enumerate(layout):
        end = start + math.prod(grid)
        segments.append(Segment(kinds[i % 3], grid, slice(start, end)))
        start = end
    return tuple(segments)


def tokens_for(
    method: TokenCompressor, layout: list[Grid], b: int = 2, seed: int = 0
) -> VisualTokens:
    """Random units with the evidence `method` asks for."""
    generator = torch.Generator().manual_seed(seed)
    segments = segments_of(layout)
    n = segments[-1].slice.stop
    needs = method.needs()

    def draw(layers: tuple[Any, ...], *shape: int) -> dict[int, Tensor]:
        resolved = [resolve_layer(layer, DEPTH) for layer in layers]
        return {i: torch.rand(b, *shape, generator=generator) / n for i in resolved}

    evidence = Evidence(
        draw(needs.cls_attention, HEADS, n),
        draw(needs.received_attention, HEADS, n),
        draw(needs.keys, n, HEADS, 4),
        wide_cls_attention=draw(needs.wide_cls_attention, 1, n),
        cls_features=torch.randn(b, WIDTH, generator=generator) if needs.cls_features else None,
    )
    if needs.text:
        text = torch.randn(b, 2, 5, generator=generator)
        patches = torch.randn(b, n, 5, generator=generator)
        evidence = dataclasses.replace(evidence, text=text, patches=patches)
    features = torch.randn(b, n, WIDTH, generator=generator)
    return VisualTokens.from_features(features, segments=segments, evidence=evidence)


def covering_by_definition(similarity: Tensor, weights: Tensor, k: int) -> list[int]:
    """SCOPE's greedy choice, gains computed anew at every step, in float64.

    Args:
        similarity: [n, n] of tokens.
        weights: [n] of tokens.
        k: tokens to choose.
    """
    similarity, weights = similarity.double(), weights.double()
    chosen: list[int] = []
    covered = torch.zeros(len(similarity), dtype=torch.float64)
    for _ in range(k):
        gains = (similarity - covered[:, None]).clamp(min=0).sum(0) * weights
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        covered = torch.maximum(covered, similarity[:, chosen[-1]])
    return chosen
