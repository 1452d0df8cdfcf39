"""Cases of methods inside the tower."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from vlmcompress.methods import create
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.tower.base import TowerAttention, TowerReducer, TowerState
from vlmcompress.methods.tower.evit import attentive

Arrays = dict[str, np.ndarray]


def evit(inputs: Arrays) -> Arrays:
    """`x` [B, N+1, C], `keep_rate`, `num_heads`, `fuse_token`, weights `w_*` of a timm block."""
    x, rate = torch.from_numpy(inputs["x"]), float(inputs["keep_rate"])
    method = create("evit", rate=rate, layers=(0,), fuse=bool(inputs["fuse_token"]))
    assert isinstance(method, TowerReducer)

    def weights(name: str) -> tuple[Tensor, Tensor]:
        return tuple(torch.from_numpy(inputs[f"w_{name}_{part}"]) for part in ("weight", "bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], *weights(name))

    qkv = linear(norm(x, "norm1"), *weights("attn_qkv"))
    q, k, v = qkv.unflatten(-1, (3, int(inputs["num_heads"]), -1)).permute(2, 0, 3, 1, 4)
    attention = TowerAttention(q, k, q.shape[-1] ** -0.5)
    mixed = (attention.weights() @ v).transpose(1, 2).flatten(2)
    x = x + linear(mixed, *weights("attn_proj"))
    state = TowerState.whole(x, 1, 1)
    state = TowerState(x, state.mass, state.source, state.assignment, 1, 1, attention)
    n = x.shape[1] - 1
    (left,) = method.schedule(n, None, 1, 0)
    kept = left - int(inputs["fuse_token"])
    x = method.reduce(0, state, left).hidden
    x = x + linear(gelu(linear(norm(x, "norm2"), *weights("mlp_fc1"))), *weights("mlp_fc2"))
    return {"topk_idx": attentive(state)[0][:, :kept].numpy(), "output": x.numpy()}


def tome_schedule(inputs: Arrays) -> Arrays:
    """`num_layers`, `kind` (a number, with inflection, a list), `r`, `inflection`, `r_list`."""
    rows = []
    for i, depth in enumerate(inputs["num_layers"].tolist()):
        listed = inputs["kind"][i] == 2
        numbers = [r for r in inputs["r_list"][i].tolist() if r >= 0]
        bend = float(inputs["inflection"][i]) if inputs["kind"][i] == 1 else 0.0
        rows.append(schedules.removals(depth, numbers if listed else int(inputs["r"][i]), bend))
    schedule = np.full((len(rows), max(map(len, rows))), -1)
    for row, values in zip(schedule, rows, strict=True):
        row[: len(values)] = values
    return {"schedule": schedule}
