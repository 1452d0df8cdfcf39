"""What compressors between tower and language model learn, made for one model."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from torch import nn

from vlmcompress.core.errors import UnsupportedModelError
from vlmcompress.core.keep import AutoKeep
from vlmcompress.core.tokens import Segment
from vlmcompress.families import Family
from vlmcompress.live.layercopies import first_layers
from vlmcompress.live.layerparts import known
from vlmcompress.methods.base import Method
from vlmcompress.methods.learned import Learned, drawn_for
from vlmcompress.methods.options import resolve_layer
from vlmcompress.methods.pipeline import Pipeline, Stage
from vlmcompress.methods.trained import ConnectorShape, LearnedCompressor


def with_connector_parts(
    family: Family, base: nn.Module, built: Pipeline, before: Pipeline | None = None
) -> Pipeline:
    """`built` with what its compressors between tower and language model learn.

    Args:
        family: facts about the model.
        base: the model without its head.
        built: a pipeline that was checked.
        before: the one it replaces. Its parts stay, trained as they are, for the same method as
            long as they are made for the same.

    Raises:
        CheckpointError, ConfigError: for a file that cannot be used.
    """
    if not any(stage.method.learns for stage in built.stages):
        return built
    old: list[tuple[Method, Learned | None]] = []
    if before is not None:
        old = [(stage.template, stage.parts) for stage in before.stages]
    early = len(built.split()[0]) if family.connector(base) is not None else 0
    device = next(family.tower_module(base).parameters()).device

    def learning(stage: Stage, ahead: bool) -> Stage:
        method = stage.method
        if not isinstance(method, LearnedCompressor):
            return stage
        with drawn_for(device):
            parts = method.parts(_shape(family, base, stage, ahead))
        if parts is None:
            return stage
        parts = known(stage.template, parts, old)
        parts.follow(device)
        return dataclasses.replace(stage, parts=parts)

    stages = tuple(learning(stage, i < early) for i, stage in enumerate(built.stages))
    return dataclasses.replace(built, stages=stages)


def _shape(family: Family, base: nn.Module, stage: Stage, ahead: bool) -> ConnectorShape:
    """What parts are to be made for.

    Args:
        family: facts about the model.
        base: the model without its head.
        stage: the method and its budget.
        ahead: whether it works ahead of the connector.
    """
    config: Any = base.config
    out = int(config.get_text_config().hidden_size)
    side = patches_per_side(family.tower_module(base))
    grid = None if side is None else (side // family.merge, side // family.merge)
    levels, state_width = _states(family, base, stage.method)
    return ConnectorShape(
        _width(family, base) if ahead else out,
        out,
        levels,
        grid,
        _tokens(stage, grid),
        state_width,
        partial(first_layers, base),
    )


def _states(family: Family, base: nn.Module, method: Method) -> tuple[int, int | None]:
    """How many layers of the tower a method reads, and the width of what goes between them.

    Shares of depth may name one layer twice where the tower has few.
    """
    tower, named = family.tower(base), method.needs().states
    if tower is None or not named:
        return len(named), None
    layers = tower.layers(family.tower_module(base))
    width = next(m.in_features for m in layers[0].modules() if isinstance(m, nn.Linear))
    return len({resolve_layer(layer, len(layers)) for layer in named}), width


def _tokens(stage: Stage, grid: tuple[int, int] | None) -> int | None:
    if isinstance(stage.keep, AutoKeep):
        return None
    if grid is None:
        return stage.keep if isinstance(stage.keep, int) else None
    h, w = grid
    return stage.method.tokens_kept((Segment("image", (1, h, w), slice(0, h * w)),), stage.keep)


def _width(family: Family, base: nn.Module) -> int:
    """Of the rows that the connector reads."""
    connector = family.connector(base)
    assert connector is not None  # asked for stages ahead of it only
    for module in connector.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
    raise UnsupportedModelError(
        f"The connector of this {family.model_type} model does not say how wide the rows are that "
        "it reads, so nothing can be trained ahead of it; use a method that learns nothing."
    )


def patches_per_side(tower: nn.Module) -> int | None:
    """Patches along a side of the images that a tower was made for, where it tells."""
    config: Any = getattr(tower, "config", None)
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return side // patch if isinstance(side, int) and isinstance(patch, int) else None
