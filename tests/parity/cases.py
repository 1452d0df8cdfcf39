"""The cases of the original implementations, answered by this library's method classes.

Inputs keep the original conventions: attention rows hold [CLS] in column 0, hidden states in row 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests.parity import compressors, decoder, prompt, tower, vqtoken
from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods import TokenCompressor, TokenPruner, create
from vlmcompress.methods.base import AdaptiveCompressor, resolve_layer
from vlmcompress.methods.connector.divprune import DivPrune
from vlmcompress.methods.connector.scope import Scope
from vlmcompress.methods.ops import merging
from vlmcompress.methods.parts import Partition, run_in_parts

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
    """`cls_attn_layer22` [1, H, N+1], `token_budget_rate`; out [k], or a mask over tiles."""
    if "num_patches" in inputs:
        return _hired_next(inputs)
    rows = torch.from_numpy(inputs["cls_attn_layer22"])
    places = np.zeros((rows.shape[0], rows.shape[2] - 1, 1), np.float32)
    rate = float(inputs["token_budget_rate"])
    kept = _prune(create("hired"), places, {22: rows, 0: rows}, 24, rate)["kept_idx"]
    return {"kept_idx": kept[0] if len(kept) == 1 else kept}


def _hired_next(inputs: Arrays) -> Arrays:
    """`cls_attn_layer0|22` [tiles, H, N+1], `num_patches` per image, `alpha`; mask [tiles, N]."""
    rate, masks = float(inputs["token_budget_rate"]), []
    method = create("hired", alpha=float(inputs["alpha"]), faithful=True)
    assert isinstance(method, TokenPruner)
    stop = 0
    for views in inputs["num_patches"].tolist():
        start, stop = stop, stop + views
        rows = {
            i: torch.from_numpy(inputs[f"cls_attn_layer{i}"][start:stop, :, 1:])
            .transpose(0, 1)
            .flatten(1)[None]
            for i in (22, 0)
        }
        n = rows[0].shape[-1]
        tokens = VisualTokens.from_features(
            torch.zeros(1, n, 1),
            tile=torch.arange(views).repeat_interleave(n // views),
            evidence=Evidence(cls_attention=rows),
        )
        mask = np.zeros(n, bool)
        mask[method.compress(tokens, rate).index[0].numpy()] = True
        masks.append(mask.reshape(views, -1))
    return {"mask": np.concatenate(masks)}


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


def _visionzip(inputs: Arrays) -> Arrays:
    """`hidden_states` [B, N+1, C], `keys_per_head` [B, H, N+1, hd], `cls_attn`, counts."""
    if "tile_features" in inputs:
        return _visionzip_tiles(inputs)
    hidden = torch.from_numpy(inputs["hidden_states"])
    keys = torch.from_numpy(inputs["keys_per_head"])[:, :, 1:].transpose(1, 2)
    dominant, contextual = int(inputs["dominant"]), int(inputs["contextual"])
    evidence = Evidence(
        cls_attention={22: torch.from_numpy(inputs["cls_attn"])[:, :, 1:]},
        keys={22: keys},
        cls_features=hidden[:, 0],
    )
    kept = _compress(
        "visionzip",
        hidden[:, 1:],
        evidence,
        dominant + contextual,
        contextual=contextual,
        faithful=True,
    )
    # The first row is [CLS], which is 0 there; patches count from 1.
    index = torch.cat([torch.zeros_like(kept.index[:, :1]), kept.index[:, 1:dominant] + 1], 1)
    return {"kept_idx_with_cls": index.numpy(), "output": kept.features.numpy()}


def _visionzip_tiles(inputs: Arrays) -> Arrays:
    """`tile_features` [tiles, d + c, D], `keep_idx_with_cls` [tiles, d], `grid_w|h`, `tile_side`.

    What each tile keeps is given: [CLS], dominant tokens by place, contextual tokens. The library
    joins them.
    """
    given, dominant = torch.from_numpy(inputs["tile_features"]), inputs["keep_idx_with_cls"]
    side, k = int(inputs["tile_side"]), given.shape[1]
    method = create("visionzip", contextual=k - dominant.shape[1], faithful=True)
    assert isinstance(method, TokenCompressor)
    tile = torch.arange(1, len(given) + 1).view(int(inputs["grid_h"]), int(inputs["grid_w"]))
    tile = tile.repeat_interleave(side, 0).repeat_interleave(side, 1).flatten()
    made = iter(zip(given, dominant, strict=True))

    def run(part: VisualTokens) -> list[VisualTokens]:
        rows, kept = next(made)
        places = torch.from_numpy(np.sort(kept[1:])) - 1
        free = torch.ones(part.n, dtype=torch.bool).index_fill(0, places, False).nonzero()[:, 0]
        # [CLS] and contextual tokens take places that no dominant token has.
        source = torch.cat([free[:1], places, free[1 : k - len(places)]])[None]
        moved = torch.full((1, part.n), -1).scatter(1, source, torch.arange(k)[None])
        return [part.regroup(rows[None], source, moved)]

    tokens = VisualTokens.from_features(torch.zeros(1, len(tile), given.shape[2]), tile=tile)
    (joined,) = run_in_parts(tokens, Partition(), lambda part: False, run, method.sections)
    return {"output": joined.features[0].numpy()}


def _prumerge(inputs: Arrays) -> Arrays:
    """`features` [B, N, C], `q_last` [B, 1, C], `k_last` [B, N+1, C], `adaptive`, `fixed_ratio`."""
    method = create("prumerge", faithful=True)
    return _prumerged(method, inputs, None if inputs["adaptive"] else float(inputs["fixed_ratio"]))


def _prumerge_plus(inputs: Arrays) -> Arrays:
    """As `_prumerge`; or `top_n` and `step_length`."""
    fixed = {}
    if "top_n" in inputs:
        fixed = {"top": int(inputs["top_n"]), "stride": int(int(inputs["step_length"]) / 3)}
    return _prumerged(create("prumerge_plus", faithful=True, **fixed), inputs, None)


def _prumerged(method: object, inputs: Arrays, keep: float | None) -> Arrays:
    """`keep` None stands for the count that the method decides on."""
    assert isinstance(method, AdaptiveCompressor)
    queries, keys = (torch.from_numpy(inputs[name]).float() for name in ("q_last", "k_last"))
    row = (queries @ keys.transpose(1, 2) * keys.shape[2] ** -0.5).softmax(-1)
    evidence = Evidence(keys={23: keys[:, 1:, None]}, wide_cls_attention={23: row[:, :, 1:]})
    features = torch.from_numpy(inputs["features"])
    tokens = VisualTokens.from_features(features, evidence=evidence)
    kept = method.adapt(tokens) if keep is None else method.compress(tokens, keep)
    assert keep is not None or method.counts(tokens) == [kept.n] * len(features)
    dtype = np.float16 if "top_n" in inputs else np.float32
    output = kept.features.numpy().astype(dtype)
    return {"selected_idx": kept.index[:, :-1].numpy(), "output": output}


def _vispruner(inputs: Arrays) -> Arrays:
    """`features` [B, N, C], `cls_attn` [B, H, N+1], `k`, `important_ratio`."""
    options = {"important": float(inputs["important_ratio"])}
    return _kept("vispruner", inputs, options)


def _scope(inputs: Arrays) -> Arrays:
    """`features` [B, N, C], `cls_attn` [B, H, N+1], `k`, `alpha`; out in selection order."""
    method = create("scope", alpha=float(inputs["alpha"]))
    assert isinstance(method, Scope)
    tokens = _with_cls_row(inputs)
    order = method.order(tokens, int(inputs["k"]))
    assert torch.equal(method.compress(tokens, int(inputs["k"])).index, order.sort(1).values)
    return {"selected_idx": order.numpy()}


def _holov(inputs: Arrays) -> Arrays:
    """`features` [B, N, C], `cls_attn_mean` [B, N], `num_crops`, `k`, `alpha`."""
    evidence = Evidence(cls_attention={22: torch.from_numpy(inputs["cls_attn_mean"])[:, None]})
    kept = _compress(
        "holov",
        torch.from_numpy(inputs["features"]),
        evidence,
        int(inputs["k"]),
        crops=int(inputs["num_crops"]),
        alpha=float(inputs["alpha"]),
        faithful=True,
    )
    return {"output_src_idx": kept.index.numpy(), "output": kept.features.numpy()}


def _vscan(inputs: Arrays) -> Arrays:
    """`features` [B, 576, D], `cls_attn_shallow`, `cls_attn_deep` [B, 576], `k` and windows."""
    rows = (inputs["cls_attn_shallow"], inputs["cls_attn_deep"])
    evidence = Evidence(
        cls_attention={i: torch.from_numpy(r)[:, None] for i, r in zip((5, 22), rows, strict=True)}
    )
    side = int(inputs["grid_side"])
    kept = _compress(
        "vscan",
        torch.from_numpy(inputs["features"]),
        evidence,
        int(inputs["k"]),
        grid=(1, side, side),
        window=int(inputs["window_size"]),
        local=float(inputs["shallow_fraction"]),
        faithful=True,
    )
    return {"kept_idx": kept.index.numpy(), "merged_features": kept.features.numpy()}


def _cdpruner(inputs: Arrays) -> Arrays:
    """`projected_features` [B, N, D], `image_embeds` [B, N, E], `text_embeds` [M, E], `k`."""
    features = torch.from_numpy(inputs["projected_features"])
    text = torch.from_numpy(inputs["text_embeds"]).expand(len(features), -1, -1)
    evidence = Evidence(text=text, patches=torch.from_numpy(inputs["image_embeds"]))
    kept = _compress("cdpruner", features, evidence, int(inputs["k"]), faithful=True)
    return {"kept_idx": kept.index.numpy()}


def _tome(inputs: Arrays) -> Arrays:
    """`metric` [B, N, C], `x` [B, N, D], `size` [B, N, 1], `r`, `class_token`, `r2`; or `k`.

    Or what a schedule is made of.
    """
    if "num_layers" in inputs:
        return tower.tome_schedule(inputs)
    metric, x = torch.from_numpy(inputs["metric"]), torch.from_numpy(inputs["x"])
    if "k" in inputs:
        found = merging.last_of_each(metric, int(inputs["k"]))
        merged, size = _merge(x, torch.ones(*x.shape[:2]), found)
        return {"merged": merged.numpy(), "merged_size": size[..., None].numpy()}
    protected, size = bool(inputs["class_token"]), torch.from_numpy(inputs["size"])[..., 0]
    first = merging.bipartite(metric, _at_most(inputs["r"], metric, protected), protected=protected)
    merged, total = _merge(x, size, first)
    k = first.kept.shape[1]
    metric = merging.group_mean(metric, first.moved, k)
    again = _at_most(inputs["r2"], metric, protected)
    second = merging.bipartite(metric, again, protected=protected)
    merged2, total2 = _merge(merged, total, second)
    return {
        "merged": merged.numpy(),
        "merged_size": total[..., None].numpy(),
        "source": (first.moved[:, None] == torch.arange(k)[:, None]).numpy().astype(np.uint8),
        "merged2": merged2.numpy(),
        "merged_size2": total2[..., None].numpy(),
    }


def _at_most(r: np.ndarray, metric: Tensor, protected: bool) -> int:
    return min(int(r), (metric.shape[1] - protected) // 2)


def _merge(x: Tensor, size: Tensor, found: merging.Matching) -> tuple[Tensor, Tensor]:
    k = found.kept.shape[1]
    total = merging.group_sum(size[..., None], found.moved, k)[..., 0]
    return merging.group_mean(x, found.moved, k, size), total


def _pitome(inputs: Arrays) -> Arrays:
    """`metric`, `x`, `size`, `ratio`, `margin`, `class_token` and which rule pairs the tokens."""
    metric, x = torch.from_numpy(inputs["metric"]), torch.from_numpy(inputs["x"])
    size, margin = torch.from_numpy(inputs["size"])[..., 0], float(inputs["margin"])
    protected, ratio = bool(inputs["class_token"]), float(inputs["ratio"])
    if inputs["use_bsm"]:
        n = metric.shape[1]
        found = merging.bipartite(metric, int(n - n * ratio), protected=protected)
    else:
        rule = merging.by_rank if inputs["use_bsm_pitome"] else merging.crowded
        n = metric.shape[1] - protected
        found = rule(metric[:, int(protected) :], int(n - n * ratio), margin=margin)
        found = _with_cls(found) if protected else found
    wavg, total = _merge(x, size, found)
    mean = merging.group_mean(x, found.moved, found.kept.shape[1])
    merged = {"merged_wavg": wavg, "merged_size": total[..., None], "merged_mean": mean}
    return {name: values.numpy() for name, values in merged.items()}


def _with_cls(found: merging.Matching) -> merging.Matching:
    """The matching of the rows after row 0, which stays."""
    first = torch.zeros_like(found.kept[:, :1])
    rows = (torch.cat([first, part + 1], 1) for part in (found.kept, found.moved))
    return merging.Matching(*rows)


def _kept(name: str, inputs: Arrays, options: dict[str, float]) -> Arrays:
    method = create(name, **options)
    assert isinstance(method, TokenCompressor)
    return {"kept_idx": method.compress(_with_cls_row(inputs), int(inputs["k"])).index.numpy()}


def _with_cls_row(inputs: Arrays) -> VisualTokens:
    """`features` [B, N, C] with `cls_attn` [B, H, N+1] as evidence."""
    evidence = Evidence(cls_attention={22: torch.from_numpy(inputs["cls_attn"])[:, :, 1:]})
    return VisualTokens.from_features(torch.from_numpy(inputs["features"]), evidence=evidence)


def _compress(
    name: str,
    features: Tensor,
    evidence: Evidence,
    keep: int,
    grid: tuple[int, int, int] | None = None,
    **options: object,
) -> VisualTokens:
    method = create(name, **options)
    assert isinstance(method, TokenCompressor)
    segments = None if grid is None else (Segment("image", grid, slice(0, math.prod(grid))),)
    tokens = VisualTokens.from_features(features, segments=segments, evidence=evidence)
    return method.compress(tokens, keep)


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
    "visionzip": _visionzip,
    "prumerge": _prumerge,
    "prumerge_plus": _prumerge_plus,
    "vispruner": _vispruner,
    "scope": _scope,
    "holov": _holov,
    "vscan": lambda inputs: (decoder.vscan if "normed" in inputs else _vscan)(inputs),
    "cdpruner": _cdpruner,
    "tome": _tome,
    "pitome": _pitome,
    "evit": tower.evit,
    "ats": tower.ats,
    "mctf": tower.mctf,
    "sta": tower.sta,
    "fastv": decoder.fastv,
    "pyramiddrop": decoder.pyramiddrop,
    "sparsevlm": decoder.sparsevlm,
    "prunevid": decoder.prunevid,
    "var": decoder.var,
    "tokenpacker": compressors.tokenpacker,
    "vqtoken": vqtoken.vqtoken,
    "quecc": prompt.quecc,
    "llava_mini": prompt.llava_mini,
    "voco_llama": prompt.voco_llama,
}
