"""Whether a stage inside the tower can run on a model; said before the first image."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmcompress.core.errors import EvidenceError, UnsupportedModelError
from vlmcompress.families import Family
from vlmcompress.methods.pipeline import TowerStage

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
    _check_kernel(module, stage)
    _check_schedule(family, base, stage, depth)


def _check_kernel(module: nn.Module, stage: TowerStage) -> None:
    kernel = str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
    if stage.method.weighs_keys and any(part in kernel for part in _WITHOUT_BIAS):
        raise UnsupportedModelError(
            f"{stage.method.name} adds the log of what each token stands for to its attention "
            f"logits, and the tower's kernel {kernel!r} takes no such mask; load the tower with "
            "attn_implementation='sdpa', or use proportional=False."
        )


def _check_schedule(family: Family, base: nn.Module, stage: TowerStage, depth: int) -> None:
    """Try the schedule on images of the size that the tower was made for, where it is told."""
    config: Any = getattr(family.tower_module(base), "config", None)
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(side, int) or not isinstance(patch, int):
        return
    n, last = (side // patch) ** 2, family.last_read_layer(base, {}, depth)
    if stage.keep is None or stage.method.tokens_kept(n, stage.keep) < n:
        stage.method.schedule(n, stage.keep, depth, last)
