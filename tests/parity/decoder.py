"""Cases of methods inside the language model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.decoder_states import Maps, state_of
from vlmcompress.methods import create
from vlmcompress.methods.decoder.attending import packed
from vlmcompress.methods.decoder.attention import DecoderAttention
from vlmcompress.methods.decoder.base import DecoderState, LayerReducer
from vlmcompress.methods.decoder.prunevid_llm import PruneVidLLM, best_of_each
from vlmcompress.methods.decoder.sparsevlm import SparseVLM, text_raters
from vlmcompress.methods.decoder.var import VAR
from vlmcompress.methods.ops.density import density_peaks
from vlmcompress.methods.ops.merging import group_mean

Arrays = dict[str, np.ndarray]


def _span(length: int, start: int, n: int) -> Tensor:
    """[1, length] bool, where the image lies."""
    rows = torch.arange(length)
    return ((rows >= start) & (rows < start + n))[None]


def _method(name: str, **options: Any) -> LayerReducer:
    method = create(name, **options)
    assert isinstance(method, LayerReducer)
    return method


def fastv(inputs: Arrays) -> Arrays:
    """`attn` [1, H, S, S], `hidden` [1, S, C], `image_start`, `image_len`, `R` dropped."""
    hidden, n = torch.from_numpy(inputs["hidden"]), int(inputs["image_len"])
    visual = _span(hidden.shape[1], int(inputs["image_start"]), n)
    state = state_of(hidden, visual, Maps.of(torch.from_numpy(inputs["attn"])))
    # Python's rounding there; `keep` rounds halves up.
    k = torch.tensor([round(n * (1 - float(inputs["R"])))])
    (index,) = _method("fastv").reduce(0, state, k).keep.nonzero(as_tuple=True)[1:]
    return {"keep_index": index.numpy(), "hidden_out": hidden[:, index].numpy()}


def pyramiddrop(inputs: Arrays) -> Arrays:
    """Two stages over a right-padded batch, ranked by queries and keys of one layer."""
    hidden, valid = (torch.from_numpy(inputs[name]) for name in ("features", "attention_mask"))
    valid = valid.bool()
    n, starts = int(inputs["n_visual"]), inputs["image_start"].tolist()
    visual = torch.cat([_span(hidden.shape[1], start, n) for start in starts])
    labels = torch.from_numpy(inputs["labels"]) if "labels" in inputs else None
    ratios = tuple(inputs["ratios"].tolist())[1:]
    method = _method("pyramiddrop", ratios=ratios, layers=(8, 16, 24))
    left = method.counts(n, None, 32)
    out: Arrays = {}
    for stage in (0, 1):
        positions = torch.where(valid, valid.cumsum(1) - 1, 0)
        attention = _next_layer(inputs, hidden, positions, valid)
        state = state_of(hidden, visual, attention, valid=valid, answers=_answers(labels))
        keep = method.reduce(stage, state, torch.full((len(hidden),), left[stage])).keep & valid
        rows, valid = packed(keep)
        hidden = _zeroed(hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[2])), valid)
        visual = visual.gather(1, rows) & valid
        name = f"stage{stage + 1}"
        out[f"{name}_features"] = hidden.numpy()
        out[f"{name}_mask"] = valid.long().numpy()
        out[f"{name}_position_ids"] = torch.where(valid, valid.cumsum(1) - 1, 0).numpy()
        if labels is not None:
            labels = labels.gather(1, rows).masked_fill(~valid, -100)
            out[f"{name}_labels"] = labels.numpy()
    return out


def _zeroed(x: Tensor, valid: Tensor) -> Tensor:
    return x * valid[..., None]


def _answers(labels: Tensor | None) -> Tensor | None:
    """Rows without a label that one with a label follows."""
    if labels is None:
        return None
    labelled = torch.nn.functional.pad(labels != -100, (0, 1))
    return labelled[:, 1:] & ~labelled[:, :-1]


def _next_layer(
    inputs: Arrays, hidden: Tensor, positions: Tensor, valid: Tensor
) -> DecoderAttention:
    """Queries and keys that a Llama layer makes of its input."""
    heads, width = int(inputs["num_heads"]), int(inputs["head_dim"])
    scale = (hidden.square().mean(-1, keepdim=True) + float(inputs["ln_eps"])).rsqrt()
    normed = hidden * scale * torch.from_numpy(inputs["ln_weight"])
    rates = float(inputs["rope_base"]) ** (-torch.arange(0, width, 2) / width)
    angles = (positions[..., None] * torch.cat([rates, rates]))[:, None]

    def rotated(weight: str) -> Tensor:
        x = (normed @ torch.from_numpy(inputs[weight]).T).unflatten(-1, (heads, width))
        x = x.transpose(1, 2)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    return DecoderAttention(rotated("wq"), rotated("wk"), width**-0.5, valid)


def sparsevlm(inputs: Arrays) -> Arrays:
    """A whole site of version 1.5 or 2, the clustering alone (`x`), or the rank rule (`scale`)."""
    if "x" in inputs:
        return _clustered(torch.from_numpy(inputs["x"]), int(inputs["cluster_num"]))
    if "scale" in inputs:
        return _by_rank(inputs)
    heads = {"version": 2, "heads": int(inputs["head_topk"])} if "head_topk" in inputs else {}
    method = _method("sparsevlm", layers=(1,), table=(int(inputs["keep_count"]),), **heads)
    assert isinstance(method, SparseVLM)
    hidden = torch.from_numpy(inputs["layer_output"])
    start, n = int(inputs["v_start"]), int(inputs["n_visual"])
    visual = _span(hidden.shape[1], start, n)
    state = state_of(
        hidden,
        visual,
        Maps.of(torch.from_numpy(inputs["attn"])),
        embedded=torch.from_numpy(inputs["embeds"]),
    )
    reduction = method.reduce(0, state, torch.tensor(method.counts(n, None, 2)))
    keep = reduction.keep[0]
    new, positions = hidden[:, keep], keep.nonzero()[:, 0]
    if reduction.merged is not None:
        behind = int(keep[: start + n].sum())
        new = torch.cat([new[:, :behind], reduction.merged, new[:, behind:]], 1)
        positions = torch.arange(new.shape[1])
    raters = text_raters(state)[0, start + n :].nonzero()[:, 0]
    return {
        "rater_rel_index": raters.numpy(),
        "keep_mask": keep[None, start : start + n].numpy(),
        "new_hidden": new.numpy(),
        "new_position_ids": positions[None].numpy(),
    }


def _clustered(x: Tensor, k: int) -> Arrays:
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    _, group = density_peaks(x, torch.full((len(x),), k), valid)
    return {"merged": group_mean(x, group, k).numpy()}


def _by_rank(inputs: Arrays) -> Arrays:
    """`attn` [1, H, S, S]; the raters are given."""
    maps = torch.from_numpy(inputs["attn"])
    start, n, length = int(inputs["v_start"]), int(inputs["n_visual"]), maps.shape[-1]
    raters = torch.zeros(1, length)
    raters[0, int(inputs["text_start"]) + torch.from_numpy(inputs["rater_rel_index"])] = 1
    method = _method(
        "sparsevlm", layers=(1,), rank=(float(inputs["scale"]), float(inputs["bias"])), recycled=0.0
    )
    hidden = torch.zeros(1, length, 1)
    state = state_of(hidden, _span(length, start, n), Maps.of(maps), notes=raters)
    keep = method.reduce(0, state, torch.tensor([n])).keep[0, start : start + n]
    return {"keep_index": keep.nonzero()[:, 0].numpy()}


def vscan(inputs: Arrays) -> Arrays:
    """`normed` [1, S, D], weights `wq`, `wk` with biases, `keep`; nothing is rotated."""
    normed, features = (torch.from_numpy(inputs[name]) for name in ("normed", "features"))
    width = int(inputs["head_dim"])

    def heads(name: str) -> Tensor:
        weight, bias = (torch.from_numpy(inputs[f"{kind}{name}"]) for kind in "wb")
        projected: Tensor = torch.nn.functional.linear(normed, weight, bias)
        return projected.unflatten(-1, (-1, width)).transpose(1, 2)

    visual = _span(normed.shape[1], int(inputs["image_start"]), int(inputs["n_visual"]))
    seen = torch.ones_like(visual)
    attention = DecoderAttention(heads("q"), heads("k"), width**-0.5, seen)
    state = state_of(features, visual, attention)
    method = _method("vscan_llm", rotary=False)
    keep = method.reduce(0, state, torch.tensor([int(inputs["keep"])])).keep[0]
    return {
        "kept_idx": keep.nonzero()[:, 0].numpy(),
        "hidden_out": features[:, keep].numpy(),
        "mrope_position_ids_out": inputs["mrope_position_ids"][..., keep.numpy()],
    }


def prunevid(inputs: Arrays) -> Arrays:
    """`text_to_image_attn` [1, H, Q, N]; groups of tokens by window, and `alpha` kept of each."""
    block, alpha = torch.from_numpy(inputs["text_to_image_attn"]), float(inputs["alpha"])
    text, n = block.shape[2:]
    sizes = [
        size
        for static, dynamic, frames in zip(
            *(inputs[f"{name}_sizes"].tolist() for name in ("static", "dynamic", "window")),
            strict=True,
        )
        for size in (static, *[dynamic // frames] * frames)
    ]
    state = _questioned(block)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    group = torch.nn.functional.pad(group, (0, text), value=-1)[None]
    quota = torch.tensor([[int(alpha * size) for size in sizes]])
    method = _method("prunevid_llm")
    assert isinstance(method, PruneVidLLM)
    keep = best_of_each(method.score(state), group, quota)[0, :n]
    return {"keep_index": keep.nonzero()[:, 0].numpy()}


def var(inputs: Arrays) -> Arrays:
    """`attn` [1, H, L, L]; where the image is, `sink_index`; `rho`, `summ` and `p`."""
    weights, n = torch.from_numpy(inputs["attn"]), int(inputs["n_visual"])
    start = int(inputs["image_start"])
    visual = _span(weights.shape[-1], start, n)
    sinks = torch.zeros_like(visual)
    sinks[:, torch.from_numpy(inputs["sink_index"])] = True
    method = create("var", **{name: float(inputs[name]) for name in ("rho", "summ", "p")})
    assert isinstance(method, VAR)
    behind = weights[:, :, start + n :]
    edited = torch.cat([weights[:, :, : start + n], method.edit(behind, visual, sinks)[0]], 2)
    coordinates = method.centred(weights, visual, sinks).nonzero()
    return {"head_query_coords": coordinates.numpy(), "attn_out": edited.numpy()}


def _questioned(block: Tensor) -> DecoderState:
    """An image followed by the rows of text that attend to it."""
    text, n = block.shape[2:]
    maps = torch.zeros(*block.shape[:2], n + text, n + text)
    maps[:, :, n:, :n] = block
    return state_of(torch.zeros(1, n + text, 1), _span(n + text, 0, n), Maps.of(maps))
