"""Trained compressors between tower and LLM with small options, and random images for them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods import create
from vlmcompress.methods.connector.c_abstractor import Abstractor
from vlmcompress.methods.connector.mqt import Queries
from vlmcompress.methods.connector.tokenpacker import Packing
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.trained import ConnectorShape, LearnedCompressor

WIDTH, OUT = 16, 12
SIZES = [(6, 6), (5, 7), (1, 9), (4, 10)]
OPTIONS: dict[str, dict[str, Any]] = {
    "tokenpacker": {"layers": (0.5, -1), "head_width": 8},
    "c_abstractor": {"depth": 2, "hidden": 20},
    "mqt": {"max_tokens": 25, "head_width": 4},
}
KINDS = {"tokenpacker": Packing, "c_abstractor": Abstractor, "mqt": Queries}
every_method = pytest.mark.parametrize("name", OPTIONS)
every_size = pytest.mark.parametrize("size", SIZES)


def compressor(name: str, **more: Any) -> LearnedCompressor:
    method = create(name, **{**OPTIONS[name], **more})
    assert isinstance(method, LearnedCompressor)
    return method


def shape_for(method: LearnedCompressor, **changes: Any) -> ConnectorShape:
    levels = len(method.needs().states)
    return dataclasses.replace(ConnectorShape(WIDTH, OUT, levels, (6, 6), 9), **changes)


def trained(method: LearnedCompressor, shape: ConnectorShape | None = None) -> Learned:
    """Parts with larger numbers than untrained ones, so that nothing is lost in rounding."""
    parts = method.parts(shape or shape_for(method))
    assert parts is not None
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return parts


def images(
    method: LearnedCompressor, size: tuple[int, int], parts: Learned | None, b: int = 3
) -> VisualTokens:
    """Random images of one size with the states that the method asks for."""
    n, generator = math.prod(size), torch.Generator().manual_seed(5)
    segments = (Segment("image", (1, *size), slice(0, n)),)
    layers = range(len(method.needs().states))
    states = {layer: torch.randn(b, n, WIDTH, generator=generator) for layer in layers}
    features = torch.randn(b, n, WIDTH, generator=generator)
    tokens = VisualTokens.from_features(
        features, segments=segments, evidence=Evidence(states=states)
    )
    return dataclasses.replace(tokens, parts=parts)


def setting(
    name: str, size: tuple[int, int], **more: Any
) -> tuple[LearnedCompressor, VisualTokens]:
    method = compressor(name, **more)
    return method, images(method, size, trained(method))
