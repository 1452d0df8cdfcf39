"""Cases of methods inside the tower."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from vlmcompress.methods import create
from vlmcompress.methods.ops import merging, schedules, supertokens
from vlmcompress.methods.tower.ats import sampled, significance
from vlmcompress.methods.tower.base import TowerAttention, TowerReducer, TowerState
from vlmcompress.methods.tower.evit import attentive
from vlmcompress.methods.tower.mctf import MCTF

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
    state = dataclasses.replace(state, attention=attention)
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


def ats(inputs: Arrays) -> Arrays:
    """`attn` [B, H, N, N], `v` [B, H, N, hd], `x` [B, N, C], as many levels as there are tokens."""
    x, v = torch.from_numpy(inputs["x"]), torch.from_numpy(inputs["v"])
    b, n = x.shape[:2]
    state = _with_attention(x, torch.from_numpy(inputs["attn"]), v)
    scores = significance(state)
    ascending = scores.argsort(dim=1, stable=True)
    chosen = sampled(scores.gather(1, ascending), int(inputs["n_ref_tokens"]) - 1)
    index = torch.full((b, n), -1)
    for i in range(b):
        rows = ascending[i][chosen[i]] + 1
        index[i, : len(rows) + 1] = torch.cat([rows.new_zeros(1), rows])
    policy = (index >= 0)[..., None]
    taken = torch.take_along_dim(x, index.clamp(min=0)[..., None], 1) * policy
    return {
        "selected_src_idx": index.numpy(),
        "policy": policy.numpy(),
        "selected_x": taken.numpy(),
    }


class _Map(TowerAttention):
    """An attention whose map is given."""

    def weights(self, rows: slice = slice(None)) -> Tensor:
        """Rows of it, kept in the place of the queries."""
        return self.q[:, :, rows]


def _with_attention(x: Tensor, weights: Tensor, v: Tensor | None = None) -> TowerState:
    state = TowerState.whole(x, 1, 1)
    return dataclasses.replace(state, attention=_Map(weights, weights, 1.0, v))


def mctf(inputs: Arrays) -> Arrays:
    """`x` [B, N, C], `attn` [B, H, N, N], `size`, `r`, `num_protected`, taus, `bidirection`."""
    method = create(
        "mctf",
        **{f"tau_{ours}": float(inputs[f"tau_{theirs}"]) for ours, theirs in TAUS.items()},
        bidirectional=bool(inputs["bidirection"]),
    )
    assert isinstance(method, MCTF)
    weights, size = torch.from_numpy(inputs["attn"]), torch.from_numpy(inputs["size"])[..., 0]
    state = _with_attention(torch.from_numpy(inputs["x"]), weights)
    state = dataclasses.replace(state, mass=size)
    n, r = state.patches, int(inputs["r"])
    short = method.reduce(0, state, n - r)
    received = state.attended().received()
    found = method.match(state, received, r)
    ones = torch.ones_like(size)
    columns = merging.group_sum(weights.mean(1).transpose(1, 2), found.moved, n + 1 - r, ones)
    ahead = merging.group_mean(columns.transpose(1, 2), found.moved, n + 1 - r, received * size)
    return {
        "merged_infoweighted": short.hidden.numpy(),
        "merged_size": short.mass[..., None].numpy(),
        "merged_sizeweighted": merging.join(state.hidden, found, size).numpy(),
        "attn_next_mean": ahead.numpy(),
    }


TAUS = {"similarity": "sim", "information": "info", "size": "size"}


def sta(inputs: Arrays) -> Arrays:
    """`x_bchw` [B, C, H, W], `stoken_size`, `n_iter`."""
    x, side = torch.from_numpy(inputs["x_bchw"]), int(inputs["stoken_size"])
    found = supertokens.cluster(x, (side, side), int(inputs["n_iter"]))
    return {
        "super_tokens_bchw": found.tokens.numpy(),
        "affinity_b9hw": found.by_place().numpy(),
        "pixel_out": found.spread(x.shape[2:]).numpy(),
    }
