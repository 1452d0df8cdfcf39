"""The cases of trained compressors between tower and LLM: their weights are inputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods.connector.tokenpacker import Packing, TokenPacker

Arrays = dict[str, np.ndarray]


def tokenpacker(inputs: Arrays) -> Arrays:
    """`x` [B, N, C], `x_multi` [B, N, L * C], `raw_grid`, `scale_factor`, `num_heads`, `w__*`."""
    x, deep = (torch.from_numpy(inputs[name]) for name in ("x", "x_multi"))
    side, width = int(inputs["raw_grid"]), x.shape[-1]
    weights = weights_of(inputs)
    out = len(weights["mlp.2.weight"])
    parts = Packing(width, out, deep.shape[-1], int(inputs["num_heads"]))
    parts.load_state_dict(weights)
    tokens = VisualTokens.from_features(
        x,
        segments=(Segment("image", (1, side, side), slice(0, side**2)),),
        evidence=Evidence(states=dict(enumerate(deep.split(width, -1)))),
    )
    k = (side // int(inputs["scale_factor"])) ** 2
    packed = TokenPacker().compress(dataclasses.replace(tokens, parts=parts), k)
    return {"output": packed.features.detach().numpy()}


def weights_of(inputs: Arrays) -> dict[str, Tensor]:
    """Tensors by their names in the original module, whose dots are written as `__`."""
    return {
        name.removeprefix("w__").replace("__", "."): torch.from_numpy(value)
        for name, value in inputs.items()
        if name.startswith("w__")
    }
