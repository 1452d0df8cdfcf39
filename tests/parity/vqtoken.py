"""The cases of VQToken: clusters, the adaptive length and VQ-Attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmcompress.core.tokens import Segment, VisualTokens
from vlmcompress.methods.connector.vq_attention import VQAttention
from vlmcompress.methods.connector.vqtoken import VQToken, hash_maps

Arrays = dict[str, np.ndarray]
#: Sequences of 49 tokens are frames of 7 x 7.
_WEIGHT = "w_"


def vqtoken(inputs: Arrays) -> Arrays:
    """`tokens` [T, N, D] and starting centres, or `cluster_index_map` [T, N] and `codebook`."""
    if "cluster_index_map" in inputs:
        return {"output": _attended(inputs)}
    if "trial_K" in inputs:
        return _adaptive(inputs)
    kept = _started(inputs, [inputs["init_centroids"]]).compress(_video(inputs), int(inputs["K"]))
    found = _found(kept)
    if any(name.startswith(_WEIGHT) for name in inputs):
        method = _started(inputs, [inputs["init_centroids"]], attention=True)
        tokens = dataclasses.replace(_video(inputs), parts=_module(inputs))
        found["output"] = method.compress(tokens, int(inputs["K"])).features[0].detach().numpy()
    return found


def _adaptive(inputs: Arrays) -> Arrays:
    """Starting centres of every trial one after the other, then a pool for the last run."""
    cuts = np.cumsum(inputs["trial_K"])[:-1]
    starts = [*np.split(inputs["trial_init_centroids"], cuts), inputs["final_init_pool"]]
    sizes = {"smallest": int(inputs["trial_K"][0]), "largest": int(inputs["max_K"])}
    tokens = _video(inputs)
    (k,) = _started(inputs, starts, **sizes).counts(tokens)
    kept = _started(inputs, starts, **sizes).adapt(tokens)
    assert kept.n == k
    return {"best_K": np.array(k), **_found(kept)}


def _attended(inputs: Arrays) -> np.ndarray:
    numbers, codes = (torch.from_numpy(inputs[n]) for n in ("cluster_index_map", "codebook"))
    assert int(inputs["dim_feedforward"]) == 2048  # of the released module, and of this one
    with torch.no_grad():
        return _module(inputs).by_frame(codes[None], numbers[None])[0].numpy()


def _module(inputs: Arrays) -> VQAttention:
    weights = {
        name.removeprefix(_WEIGHT).replace("__", "."): torch.from_numpy(value)
        for name, value in inputs.items()
        if name.startswith(_WEIGHT)
    }
    width, places = weights["to_q_proj.weight"].shape
    module = VQAttention(width, _frame(places), int(inputs["num_heads"]), "frame")
    module.load_state_dict(weights)
    return module


def _video(inputs: Arrays) -> VisualTokens:
    tokens = torch.from_numpy(inputs["tokens"])
    t, n, _ = tokens.shape
    segments = (Segment("image", (t, *_frame(n)), slice(0, t * n)),)
    return VisualTokens.from_features(tokens.flatten(0, 1)[None], segments=segments)


def _frame(places: int) -> tuple[int, int]:
    side = math.isqrt(places)
    assert side * side == places
    return side, side


def _found(kept: VisualTokens) -> Arrays:
    (labels,) = hash_maps(kept)
    return {"labels": labels[0].flatten(1).numpy(), "codebook": kept.features[0].numpy()}


@dataclass(frozen=True)
class _Started(VQToken):
    """As released, with recorded starting centres, one after the other."""

    starts: Iterator[np.ndarray] = dataclasses.field(default_factory=lambda: iter(()))

    def start(self, tokens: VisualTokens, x: Tensor, k: int) -> Tensor:
        return torch.from_numpy(next(self.starts)[None, :k])


def _started(inputs: Arrays, starts: Iterable[np.ndarray], **options: object) -> _Started:
    assert float(inputs.get("tol", 1e-4)) == 1e-4  # the default of `kmeans`
    return _Started(
        faithful=True,
        rescale=False,
        iterations=int(inputs.get("max_iter", 50)),
        heads=int(inputs.get("num_heads", 8)),
        starts=iter(starts),
        **options,
    )
