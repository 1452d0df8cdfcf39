"""The cases of methods that rewrite the prompt, answered by their parts."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from vlmcompress.methods.prompt.llava_mini import Resampler
from vlmcompress.methods.prompt.quecc import QueryCondenser
from vlmcompress.methods.prompt.voco_llama import Blocks

Arrays = dict[str, np.ndarray]


@torch.no_grad()
def quecc(inputs: Arrays) -> Arrays:
    """`x` [B, N, D], `x_multi` [B, N, L * D], `text` [B, 1, E], `kernel`, `num_heads`, weights."""
    x, levels, text = (torch.from_numpy(inputs[name]) for name in ("x", "x_multi", "text"))
    side, kernel, width = math.isqrt(x.shape[1]), int(inputs["kernel"]), x.shape[2]
    parts = QueryCondenser(
        width,
        levels.shape[2] // width,
        text.shape[2],
        (kernel, kernel),
        int(inputs["num_heads"]),
    )
    parts.load_state_dict(_weights(inputs))
    cells = (side // kernel, side // kernel)
    return {"output": parts(x, levels, text[:, 0], (side, side), cells).numpy()}


@torch.no_grad()
def llava_mini(inputs: Arrays) -> Arrays:
    """`x` [B, N, D], `grid_size`, `num_heads`, weights."""
    x, grid = torch.from_numpy(inputs["x"]), int(inputs["grid_size"])
    side = math.isqrt(x.shape[1])
    resampler: nn.Module = Resampler(x.shape[2], (grid, grid), int(inputs["num_heads"]))
    resampler.load_state_dict(_weights(inputs))
    return {"output": resampler(x, (side, side))[0].numpy()}


def voco_llama(inputs: Arrays) -> Arrays:
    """`marked` [B, S] ids, `voco_id`; out [B, 1, S, S]."""
    voco = torch.from_numpy(inputs["marked"]) == int(inputs["voco_id"])
    return {"allowed": Blocks.released(voco).visible().long().numpy()}


def _weights(inputs: Arrays) -> dict[str, Tensor]:
    """By the names of the released code."""
    return {
        name.removeprefix("w__").replace("__", "."): torch.from_numpy(value)
        for name, value in inputs.items()
        if name.startswith("w__")
    }
