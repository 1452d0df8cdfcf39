"""The cases of the original implementations, answered by this library's method classes.

Inputs keep the original conventions: attention rows hold [CLS] in column 0, hidden states in row 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vlmcompress.core.tokens import Evidence, VisualTokens
from vlmcompress.methods import TokenPruner, create
from vlmcompress.methods.base import resolve_layer
from vlmcompress.methods.connector.divprune import DivPrune

Arrays = dict[str, np.ndarray]


def run(method: str, case: str, inputs: Arrays) -> Arrays:
    """The results of one case.

    Args:
        method: name of the method.
        case: name of the case; cases of one method differ in their inputs only.
        inputs: arrays by name, hyperparameters as 0-d arrays.

    Raises:
        KeyError: for a method without cases.
    """
    return _RUNNERS[method](inputs)


def _fastervlm(inputs: Arrays) -> Arrays:
    """`features` [B, N, C], `cls_attn` [B, H, N+1], `k`."""
    method = create("fastervlm")
    rows = torch.from_numpy(inputs["cls_attn"])
    return _prune(method, inputs["features"], {22: rows}, 24, int(inputs["k"]))


def _vtc_cls(inputs: Arrays) -> Arrays:
    """`hidden_states` [1, N+1, C], `cls_attn_layers` [L, H, N+1], `start_layer`, `k`."""
    rows = torch.from_numpy(inputs["cls_attn_layers"])
    depth = len(rows)
    # Layers from the start up to, not including, the last; named from the end, as the defaults are.
    layers = tuple(i - depth for i in range(depth)[int(inputs["start_layer"]) : -1])
    rows = rows[:, None] if rows.ndim == 3 else rows
    evidence = dict(enumerate(rows))
    features = inputs["hidden_states"][:, 1:]
    return _prune(create("vtc_cls", layers=layers), features, evidence, depth, int(inputs["k"]))


def _hired(inputs: Arrays) -> Arrays:
    """`cls_attn_layer22` [1, H, N+1], `token_budget_rate`; out [k]."""
    rows = torch.from_numpy(inputs["cls_attn_layer22"])
    places = np.zeros((rows.shape[0], rows.shape[2] - 1, 1), np.float32)
    rate = float(inputs["token_budget_rate"])
    kept = _prune(create("hired"), places, {22: rows}, 24, rate)["kept_idx"]
    return {"kept_idx": kept[0] if len(kept) == 1 else kept}


def _divprune(inputs: Arrays) -> Arrays:
    """`features` [N, C] (or [B, N, C]), `ratio`; out [k] (or [B, k]) in selection order."""
    method = create("divprune")
    assert isinstance(method, DivPrune)
    features = torch.from_numpy(inputs["features"])
    tokens = VisualTokens.from_features(features.reshape(-1, *features.shape[-2:]))
    order = method.order(tokens, float(inputs["ratio"]))
    kept = method.compress(tokens, float(inputs["ratio"])).index
    assert torch.equal(order.sort(-1).values, kept)
    return {"selected_idx": order.reshape(*features.shape[:-2], -1).numpy()}


def _prune(
    method: object, features: np.ndarray, rows: dict[int, Tensor], depth: int, keep: float | int
) -> Arrays:
    """Compress with those [CLS] rows ({layer: [b, heads, 1 + n]}) that the method asks for."""
    assert isinstance(method, TokenPruner)
    layers = [resolve_layer(layer, depth) for layer in method.needs().cls_attention]
    evidence = Evidence(cls_attention={i: rows[i][:, :, 1:] for i in layers})
    tokens = VisualTokens.from_features(torch.from_numpy(features), evidence=evidence)
    kept = method.compress(tokens, keep)
    return {"kept_idx": kept.index.numpy(), "kept_features": kept.features.numpy()}


_RUNNERS: dict[str, Callable[[Arrays], Arrays]] = {
    "fastervlm": _fastervlm,
    "vtc_cls": _vtc_cls,
    "hired": _hired,
    "divprune": _divprune,
}
