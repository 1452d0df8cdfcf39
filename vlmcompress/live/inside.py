"""Whether a stage inside the tower can run on a model; said before the first image."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from vlmcompress.core.errors import EvidenceError, UnsupportedModelError
from vlmcompress.families import Family
from vlmcompress.families.towers import Tower
from vlmcompress.live.connectorparts import patches_per_side, with_connector_parts
from vlmcompress.live.layerparts import with_layer_parts
from vlmcompress.live.sparserun import makes_attention
from vlmcompress.methods.pipeline import Pipeline, TowerStage
from vlmcompress.methods.tower.exiting import TowerExit
from vlmcompress.methods.tower.shape import TowerShape
from vlmcompress.methods.tower.sparsity import AttentionSparsifier

#: Parts of the names of attention kernels that take no additive mask.
_WITHOUT_BIAS = ("flash",)


def check_tower(family: Family, base: nn.Module, stage: TowerStage) -> None:
    """Refuse a stage inside a tower whose rows cannot be reduced.

    Raises:
        UnsupportedModelError: for towers and connectors that count rows, or a kernel without bias.
        EvidenceError: for a method that follows [CLS] where there is none.
        ConfigError: when as many patches cannot go as the stage wants.
    """
    method, tower, module = stage.method, family.tower(base), family.tower_module(base)
    if tower is None or tower.norm is None:
        raise UnsupportedModelError(
            f"{method.name} acts inside the tower, and the rows of this {family.model_type} tower "
            "cannot be reduced between its blocks (it packs images, or is not known); use a "
            "method between tower and LLM, such as 'divprune'."
        )
    if isinstance(method, TowerExit):
        _check_schedule(family, base, stage, len(tower.layers(module)))
        return
    if isinstance(method, AttentionSparsifier):
        check_attention(stage, family.model_type, tower, module)
        _check_schedule(family, base, stage, len(tower.layers(module)))
        return
    if family.connector(base) is None or family.merge > 1:
        raise UnsupportedModelError(
            f"{method.name} acts inside the tower, and what follows the tower of this "
            f"{family.model_type} model counts its rows (tiles, or squares of patches); use a "
            "method between tower and LLM, such as 'divprune'."
        )
    depth = len(tower.layers(module))
    if len(set(family.read_layers(base, {}, depth))) > 1:
        raise UnsupportedModelError(
            f"{method.name} acts inside the tower, and the connector of this {family.model_type} "
            "reads several layers side by side, which would differ in length; use a method "
            "between tower and LLM, such as 'divprune'."
        )
    if method.needs_cls and not tower.has_cls:
        raise EvidenceError(
            f"{method.name} follows the [CLS] token, and this {family.model_type} tower has none; "
            "use 'tome_tower'."
        )
    check_kernel(module, stage)
    _check_schedule(family, base, stage, depth)


def with_parts(
    family: Family, base: nn.Module, built: Pipeline, before: Pipeline | None = None
) -> Pipeline:
    """`built` with what its methods learn, wherever they act; see `learning`."""
    built = with_connector_parts(family, base, with_layer_parts(base, built, before), before)
    tower, module = family.tower(base), family.tower_module(base)
    if built.tower is None or tower is None:
        return built
    last = family.last_read_layer(base, {}, len(tower.layers(module)))
    place = TowerPlace(family.model_type, tower, module, _patches(module), last)
    return learning(built, place, before)


@dataclass(frozen=True)
class TowerPlace:
    """Where parts are to work.

    Attributes:
        name: of the model, for messages.
        tower: facts about the tower.
        module: the tower.
        patches: of the images it was made for; None where it does not tell.
        last: its last layer whose output is read.
    """

    name: str
    tower: Tower
    module: nn.Module
    patches: int | None
    last: int


def learning(built: Pipeline, place: TowerPlace, before: Pipeline | None = None) -> Pipeline:
    """`built` with what the method in the tower learns, for images the tower was made for.

    Args:
        built: a pipeline that was checked.
        place: the tower.
        before: the one it replaces. Its parts stay, trained as they are, for the same method as
            long as they are made for the same; where all patches stay, for when fewer do again.

    Raises:
        UnsupportedModelError: when the tower does not say which images it was made for.
        CheckpointError, ConfigError: for a file that cannot be used.
    """
    stage = built.tower
    if stage is None or not stage.method.learns:
        return built
    old = None if before is None else before.tower
    same = old is not None and old.method == stage.method
    shape = _shape(stage, place)
    if shape is None:
        parts = old.parts if old is not None and same else None
    else:
        parts = stage.method.parts(shape)
        if parts is not None and old is not None and old.parts is not None and same:
            parts = old.parts if old.parts.config == parts.config else parts
    if parts is not None:
        parts.follow(next(place.module.parameters()).device)
    return dataclasses.replace(built, tower=dataclasses.replace(stage, parts=parts))


def _shape(stage: TowerStage, place: TowerPlace) -> TowerShape | None:
    """What parts are to be made for; None where all patches stay and none are needed."""
    tower, n, keep = place.tower, place.patches, stage.keep
    layers = tower.layers(place.module)
    if n is None:
        raise UnsupportedModelError(
            f"{stage.method.name} has trained parts, which are made for one size of images, and "
            f"this {place.name} tower does not say for which it was made; use a method "
            "that learns nothing, such as 'tome_tower'."
        )
    attention = layers[0].get_submodule(tower.attention)
    rows_go = not isinstance(stage.method, AttentionSparsifier)
    if rows_go and keep is not None and stage.method.tokens_kept(n, keep) >= n:
        return None
    plan = stage.method.schedule(n, keep, len(layers), place.last)
    width = int(layers[0].get_submodule(tower.first_norm).weight.shape[0])  # type: ignore[index]
    head_dim = getattr(attention, "head_dim", None)
    return TowerShape(width, head_dim, n, int(tower.has_cls), len(layers), plan)


def check_attention(stage: TowerStage, name: str, tower: Tower, module: nn.Module) -> None:
    """Refuse a method that makes the attention of blocks in a tower where that cannot be.

    Raises:
        UnsupportedModelError: when projections are fused or hidden, or rows are registers.
    """
    attention = tower.layers(module)[0].get_submodule(tower.attention)
    if isinstance(stage.method, AttentionSparsifier) and not makes_attention(tower, attention):
        raise UnsupportedModelError(
            f"{stage.method.name} makes the attention of the tower's blocks, whose projections "
            f"this {name} tower keeps to itself; use a method that takes patches off, such as "
            "'tome_tower'."
        )


def check_kernel(module: nn.Module, stage: TowerStage) -> None:
    """Refuse a kernel that cannot weigh keys where the stage wants that.

    Raises:
        UnsupportedModelError: for such a kernel.
    """
    kernel = str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
    if stage.method.weighs_keys and any(part in kernel for part in _WITHOUT_BIAS):
        raise UnsupportedModelError(
            f"{stage.method.name} adds the log of what each token stands for to its attention "
            f"logits, and the tower's kernel {kernel!r} takes no such mask; load the tower with "
            "attn_implementation='sdpa', or use proportional=False."
        )


def _check_schedule(family: Family, base: nn.Module, stage: TowerStage, depth: int) -> None:
    """Try the schedule on images of the size that the tower was made for, where it is told."""
    n, last = _patches(family.tower_module(base)), family.last_read_layer(base, {}, depth)
    if n is None:
        return
    if isinstance(stage.method, AttentionSparsifier):
        stage.method.connections(n, stage.keep, depth, last)
        return
    if stage.keep is None or stage.method.tokens_kept(n, stage.keep) < n:
        stage.method.schedule(n, stage.keep, depth, last)


def _patches(module: nn.Module) -> int | None:
    """Patches of the images that a tower was made for, where its configuration tells."""
    side = patches_per_side(module)
    return None if side is None else side**2
