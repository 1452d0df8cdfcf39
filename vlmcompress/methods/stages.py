"""Methods applied to images: groups of equal length in, shorter groups out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from vlmcompress.core.keep import AutoKeep, auto_count
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import Layer, Needs, TokenCompressor, TokenPruner, resolve_layer
from vlmcompress.methods.parts import in_parts, run_in_parts
from vlmcompress.methods.pipeline import Stage

Group: TypeAlias = VisualTokens


@dataclass(frozen=True)
class Resolved:
    """Evidence layers as absolute indices."""

    cls_layers: frozenset[int]
    received_layers: frozenset[int]
    key_layers: frozenset[int]

    @classmethod
    def of(cls, needs: Needs, depth: int) -> Resolved:
        """Resolve every layer of `needs` in a tower of `depth` layers."""

        def resolve(layers: tuple[Layer, ...]) -> frozenset[int]:
            return frozenset(resolve_layer(layer, depth) for layer in layers)

        return cls(
            resolve(needs.cls_attention), resolve(needs.received_attention), resolve(needs.keys)
        )

    def all(self) -> frozenset[int]:
        """Every layer something is read from."""
        return self.cls_layers | self.received_layers | self.key_layers


def run_stages(stages: Sequence[Stage], groups: list[Group], depth: int | None) -> list[Group]:
    """Apply stages to groups of equally long images; groups split where counts come to differ."""
    for stage in stages:
        groups = [out for group in groups for out in _run(stage, group, depth)]
    return groups


def _run(stage: Stage, group: Group, depth: int | None) -> list[Group]:
    if not in_parts(group):
        return _run_whole(stage, group, depth)

    def spares(part: Group) -> bool:
        method, keep = stage.method, stage.keep
        if isinstance(keep, AutoKeep) or not method.training_free:
            return False
        return method.tokens_kept(part.current_segments, keep) >= part.n

    def run(part: Group) -> list[Group]:
        return _run_whole(stage, part, depth)

    return run_in_parts(group, stage.partition, spares, run)


def _run_whole(stage: Stage, group: Group, depth: int | None) -> list[Group]:
    """Images of one view, or one part of images with several."""
    method = stage.method
    view = _evidence_for(method, group, depth)
    counts = _counts(stage, view)
    if len(set(counts)) == 1:
        budget = counts[0] if isinstance(stage.keep, AutoKeep) else stage.keep
        return [_compress(method, view, group, counts[0], budget)]
    out = []
    for k in sorted(set(counts)):
        units = torch.tensor([i for i, count in enumerate(counts) if count == k])
        out.append(_compress(method, view.take_units(units), group.take_units(units), k, k))
    return out


def _compress(
    method: TokenCompressor, view: Group, group: Group, k: int, budget: float | int
) -> Group:
    """`group` compressed; a training-free method that would keep everything is bypassed."""
    if k >= group.n and method.training_free:
        return group
    return _restore_evidence(method.compress(view, budget), group)


def _counts(stage: Stage, group: Group) -> list[int]:
    method, keep, b = stage.method, stage.keep, group.features.shape[0]
    if isinstance(keep, AutoKeep):
        assert isinstance(method, TokenPruner)  # `build` lets no other through
        return auto_count(method.score(group), keep.tau).tolist()
    return method.allocate([group.current_segments] * b, keep)


def _evidence_for(method: TokenCompressor, group: Group, depth: int | None) -> Group:
    """The group with exactly the evidence the method asked for, in the order of its layers."""
    needs, have = method.needs(), group.evidence
    if not needs.attention:
        return group
    assert depth is not None  # evidence was captured, so there is a tower

    def pick(layers: tuple[Layer, ...], rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {index: rows[index] for index in (resolve_layer(layer, depth) for layer in layers)}

    evidence = dataclasses.replace(
        have,
        cls_attention=pick(needs.cls_attention, have.cls_attention),
        received_attention=pick(needs.received_attention, have.received_attention),
        keys=pick(needs.keys, have.keys),
    )
    return dataclasses.replace(group, evidence=evidence)


def _restore_evidence(kept: Group, whole: Group) -> Group:
    """Full evidence for the rows that are left, for the stages that follow."""
    if kept.n == whole.n:
        return dataclasses.replace(kept, evidence=whole.evidence)
    rows = _rows_in(whole.index, kept.index)
    return dataclasses.replace(kept, evidence=whole.evidence.select(rows))


def _rows_in(before: Tensor, after: Tensor) -> Tensor:
    """Positions of `after`'s indices ([b, k]) in `before` ([b, n]; both hold unique values)."""
    order = before.argsort(dim=1)
    return order.gather(1, torch.searchsorted(before.gather(1, order), after.contiguous()))
