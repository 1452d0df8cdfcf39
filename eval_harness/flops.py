"""Floating-point operations of one prefill, by formula.

A multiply-add counts as two, attention counts in full (not halved for causality), and what is no
matrix product (norms, activations, softmax, sorting) counts as nothing: the convention of
`torch.utils.flop_counter.FlopCounterMode`, which misses attention under fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from vlmcompress.core.costs import layered_flops, prefill_flops, tower_flops
from vlmcompress.core.errors import UnsupportedModelError
from vlmcompress.core.report import CallRecord
from vlmcompress.methods import pipeline


@dataclass(frozen=True)
class Flops:
    """Operations of each stage of one prefill."""

    tower: int
    connector: int
    prefill: int

    @property
    def total(self) -> int:
        """All stages together."""
        return self.tower + self.connector + self.prefill

    def to_dict(self) -> dict[str, int]:
        """JSON-ready, with the total."""
        return {**asdict(self), "total": self.total}


_CLS_ROWS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def tower(
    config: PreTrainedConfig,
    images: int = 1,
    layers: int | None = None,
    patches: Sequence[tuple[int, int]] = (),
) -> int:
    """Operations of a CLIP-like tower.

    Args:
        config: its vision configuration.
        images: how many views it sees.
        layers: layers that run; all when not given.
        patches: per layer, patches in its attention and in its MLP, where some are taken away.
    """
    width, depth = config.hidden_size, config.num_hidden_layers if layers is None else layers
    whole = (config.image_size // config.patch_size) ** 2
    cls = _CLS_ROWS[config.model_type]
    embed = 2 * whole * 3 * config.patch_size**2 * width
    rows = [(a + cls, m + cls) for a, m in patches or [(whole, whole)] * depth][:depth]
    weights = 4 * width**2, 2 * width * config.intermediate_size
    return images * (embed + tower_flops(rows, *weights, width))


def windowed_tower(config: Any, grids: Sequence[tuple[int, int, int]]) -> int:
    """Operations of Qwen2.5-VL's tower, whose layers attend within windows but for a few.

    Args:
        config: its vision configuration.
        grids: (t, h, w) in patches of each image.
    """
    width, cell = config.hidden_size, config.spatial_merge_size
    side = config.window_size // config.patch_size // cell
    patches = sum(t * h * w for t, h, w in grids)
    whole = sum(t * (h * w) ** 2 for t, h, w in grids)
    windows = 0
    for t, h, w in grids:
        heights, widths = (_cuts(n // cell, side) for n in (h, w))
        windows += t * sum((a * b * cell**2) ** 2 for a in heights for b in widths)
    full = len(config.fullatt_block_indexes)
    pairs = full * whole + (config.depth - full) * windows
    volume = 3 * config.temporal_patch_size * config.patch_size**2
    block = 4 * width**2 + 3 * width * config.intermediate_size
    return 2 * patches * (volume * width + config.depth * block) + 4 * pairs * width


def _cuts(length: int, side: int) -> list[int]:
    """Sides of the windows that a length is cut into; the last may be shorter."""
    return [min(side, length - start) for start in range(0, length, side)]


def connector(config: Any, tokens: int) -> int:
    """Operations of a two-layer projector or merger on the rows that it is given.

    Args:
        config: the model's.
        tokens: rows of the tower's width.
    """
    if hasattr(config.vision_config, "spatial_merge_size"):
        cell = config.vision_config.spatial_merge_size**2
        wide = cell * config.vision_config.hidden_size
        return 2 * (tokens // cell) * wide * (wide + config.vision_config.out_hidden_size)
    layer = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layer, int) else len(layer))
    out = config.text_config.hidden_size
    return 2 * tokens * out * (width + out)


def tower_of_call(
    config: Any,
    inputs: Mapping[str, Any],
    layers: int | None = None,
    patches: Sequence[tuple[int, int]] = (),
) -> int | None:
    """Operations of the tower on the pictures of a call; None for a tower without a formula.

    Args:
        config: the model's.
        inputs: what its processor returned: `pixel_values`, with a row per tile where pictures are
            cut up, or the `image_grid_thw` of packed patches.
        layers: as `tower` takes it.
        patches: likewise.
    """
    vision = config.vision_config
    if hasattr(vision, "fullatt_block_indexes"):
        grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
        return windowed_tower(vision, grids)
    if vision.model_type not in _CLS_ROWS:
        return None
    views = math.prod(inputs["pixel_values"].shape[:-3])
    return tower(vision, views, layers, patches)


def prefill(
    config: Any,
    *,
    tower: int,
    connector_tokens: int,
    prompt_tokens: int,
    batch: int = 1,
    layers: Sequence[tuple[int, int]] = (),
) -> Flops:
    """Operations of one prefill, the logits of the last position included.

    What a method computes on top (attention rows, scores, sorting) is not counted.

    Args:
        config: the model's configuration.
        tower: operations of the tower.
        connector_tokens: rows that the connector sees, over all images.
        prompt_tokens: rows that the language model sees, per row of the batch.
        batch: rows.
        layers: rows in attention and MLP of each layer of the language model, where they differ.

    Raises:
        UnsupportedModelError: for a language model without a formula.
    """
    text = config.get_text_config()
    if layers:
        decoder = layered_flops(text, layers, batch)
    else:
        decoder = prefill_flops(text, prompt_tokens, batch)
    if decoder is None:
        raise UnsupportedModelError(
            f"No formula for a {text.model_type!r} language model; dense Llama-like stacks are "
            "known."
        )
    return Flops(tower, connector(config, connector_tokens), decoder)


def of_call(
    config: Any,
    inputs: Mapping[str, Any],
    connector_tokens: int,
    prompt_tokens: int,
    record: CallRecord | None = None,
) -> Flops | None:
    """Operations of one call as it was run.

    Args:
        config: the model's.
        inputs: what it was called with.
        connector_tokens: rows that the connector saw.
        prompt_tokens: rows that the language model saw, per row of the batch.
        record: of a compressed call; None of one without compression.

    Returns:
        None where a part has no formula: other towers, experts, keys left out of an attention.
    """
    skipped, layers = (0, ()) if record is None else (record.skipped_layers, record.layer_lengths)
    if record is not None and record.tower_keys:
        return None
    depth = getattr(config.vision_config, "num_hidden_layers", None)
    run = None if depth is None else depth - skipped
    found = tower_of_call(config, inputs, run, () if record is None else _patches(config, record))
    if found is None or not _has_projector(config):
        return None
    try:
        return prefill(
            config,
            tower=found,
            connector_tokens=connector_tokens,
            prompt_tokens=prompt_tokens,
            batch=len(inputs["input_ids"]),
            layers=layers,
        )
    except UnsupportedModelError:
        return None


#: Families whose connector is the projector or the merger that `connector` counts.
_KNOWN = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl")


def _has_projector(config: Any) -> bool:
    return config.model_type in _KNOWN


def _patches(config: Any, record: CallRecord) -> list[tuple[int, int]]:
    """Per tower layer, patches in its attention and in its MLP; empty where none are taken away."""
    after = list(record.tower_patches)
    if not after:
        return []
    built = pipeline.build(record.method, keep=1).tower
    place = "between" if built is None else built.method.place
    whole = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    before = [whole, *after][:-1]
    attention = after if place == "before" else before
    mlp = before if place == "after" else after
    return list(zip(attention, mlp, strict=True))
