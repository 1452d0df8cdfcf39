"""Methods applied to images: groups of equal length in, shorter groups out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.core.keep import AutoKeep, auto_count
from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods.base import (
    AdaptiveCompressor,
    Layer,
    Needs,
    TokenCompressor,
    TokenPruner,
    resolve_layer,
)
from vlmcompress.methods.parts import in_parts, run_in_parts
from vlmcompress.methods.pipeline import Stage

Group: TypeAlias = VisualTokens

NAN_REMEDY = (
    "Look at the pixels for NaN, and at the model's dtype for overflow (float16 is too narrow for "
    "some towers; bfloat16 is not)."
)


@dataclass(frozen=True)
class Resolved:
    """Evidence layers as absolute indices."""

    cls_layers: frozenset[int]
    received_layers: frozenset[int]
    key_layers: frozenset[int]
    wide_layers: frozenset[int] = frozenset()
    state_layers: frozenset[int] = frozenset()

    @classmethod
    def of(cls, needs: Needs, depth: int) -> Resolved:
        """Resolve every layer of `needs` in a tower of `depth` layers."""

        def resolve(layers: tuple[Layer, ...]) -> frozenset[int]:
            return frozenset(resolve_layer(layer, depth) for layer in layers)

        return cls(
            resolve(needs.cls_attention),
            resolve(needs.received_attention),
            resolve(needs.keys),
            resolve(needs.wide_cls_attention),
            resolve(needs.states),
        )

    def attention(self) -> frozenset[int]:
        """Layers whose attention, or queries and keys, are read."""
        return self.cls_layers | self.received_layers | self.key_layers | self.wide_layers

    def all(self) -> frozenset[int]:
        """Every layer something is read from."""
        return self.attention() | self.state_layers


def run_stages(
    stages: Sequence[Stage],
    groups: list[Group],
    depth: int | None,
    prompts: Sequence[int] = (),
) -> list[Group]:
    """Apply stages to groups of equally long images; groups split where counts come to differ.

    Args:
        stages: applied in order.
        groups: of all images of a call.
        depth: layers of the tower, where they are known.
        prompts: the row of the batch that each image belongs to, for budgets of whole prompts.
    """
    for stage in stages:
        runs = [(stage, group) for group in groups]
        if stage.partition.scope == "prompt":
            runs = _shared(stage, groups, prompts)
        groups = [out for own, group in runs for out in _run(own, group, depth)]
    return groups


def _shared(
    stage: Stage, groups: Sequence[Group], prompts: Sequence[int]
) -> list[tuple[Stage, Group]]:
    """The stage with each image's share of its prompt's budget; images of equal shares together."""
    shares = _shares(stage, groups, prompts)
    runs = []
    for group in groups:
        counts = [shares[owner] for owner in group.owner.tolist()]
        for count in sorted(set(counts)):
            units = torch.tensor([i for i, own in enumerate(counts) if own == count])
            same = group if len(units) == len(counts) else group.take_units(units)
            runs.append((dataclasses.replace(stage, keep=count), same))
    return runs


def _shares(stage: Stage, groups: Sequence[Group], prompts: Sequence[int]) -> dict[int, int]:
    """Count of every image."""
    assert not isinstance(stage.keep, AutoKeep)  # `build` has seen to it
    images: dict[int, dict[int, tuple[Segment, ...]]] = {}
    for group in groups:
        sizes = stage.partition.candidates(group)
        for owner, n in zip(group.owner.tolist(), sizes, strict=True):
            whole = (Segment("image", (1, 1, n), slice(0, n)),)
            segments = whole if in_parts(group) else group.current_segments
            images.setdefault(prompts[owner], {})[owner] = segments
    shares: dict[int, int] = {}
    for units in images.values():
        owners = sorted(units)
        counts = stage.method.allocate([units[owner] for owner in owners], stage.keep)
        shares.update(zip(owners, counts, strict=True))
    return shares


def _run(stage: Stage, group: Group, depth: int | None) -> list[Group]:
    if not in_parts(group):
        return _run_whole(stage, group, depth)

    def spares(part: Group) -> bool:
        method, keep = stage.method, stage.keep
        if isinstance(keep, AutoKeep) or not method.training_free or method.learns:
            return False
        return method.tokens_kept(part.current_segments, keep) >= part.n

    def run(part: Group) -> list[Group]:
        return _run_whole(stage, part, depth)

    sections = None if stage.method.raster_order else stage.method.sections
    return run_in_parts(group, stage.partition, spares, run, sections)


def _run_whole(stage: Stage, group: Group, depth: int | None) -> list[Group]:
    """Images of one view, or one part of images with several."""
    if stage.method.ragged and group.tile is not None and len(group.features) > 1:
        alone = (group.take_units(torch.tensor([i])) for i in range(len(group.features)))
        return [out for image in alone for out in _run_whole(stage, image, depth)]
    view = _evidence_for(stage.method, group, depth)
    rows = _rows(stage.outliers.needs().cls_attention, group.evidence.cls_attention, depth)
    _refuse_nan(stage.method, view, rows.values())
    view = stage.outliers.marked(view, rows)
    counts = _counts(stage, view)
    if len(set(counts)) == 1:
        return [_compress(stage, view, group, counts[0], shared=True)]
    out = []
    for k in sorted(set(counts)):
        units = torch.tensor([i for i, count in enumerate(counts) if count == k])
        out.append(_compress(stage, view.take_units(units), group.take_units(units), k))
    return out


def _compress(stage: Stage, view: Group, group: Group, k: int, shared: bool = False) -> Group:
    """`group` compressed to `k`; what learns nothing and would keep everything is bypassed.

    Args:
        stage: method and budget.
        view: the group with the evidence that the method asked for.
        group: with all evidence.
        k: tokens that will be left.
        shared: whether all images come to `k` by the stage's own budget.
    """
    method, keep = stage.method, stage.keep
    if k >= group.n and method.training_free and not method.learns:
        return group
    if stage.parts is not None:
        stage.parts.follow(view.features.device)
        view = dataclasses.replace(view, parts=stage.parts)
    if isinstance(keep, AutoKeep):
        kept = (
            method.adapt(view)
            if isinstance(method, AdaptiveCompressor)
            else method.compress(view, k)
        )
    else:
        kept = method.compress(view, keep if shared else k)
    return _restore_evidence(dataclasses.replace(kept, parts=None), group)


def _refuse_nan(method: TokenCompressor, view: Group, more: Iterable[Tensor]) -> None:
    """Refuse what no selection can be made from.

    Args:
        method: what is about to look.
        view: images with the evidence it asked for.
        more: rows of [CLS] attention that outliers are told by.

    Raises:
        UnsupportedInputError: when features or evidence that the method looks at hold NaN.
    """
    evidence = view.evidence if method.needs().attention else Evidence()
    looked_at = {
        "[CLS] attention": [
            *evidence.cls_attention.values(),
            *evidence.wide_cls_attention.values(),
            *more,
        ],
        "received attention": [*evidence.received_attention.values()],
        "keys": [*evidence.keys.values()],
        "states": [
            *([] if view.evidence.norms is None else [view.evidence.norms]),
            *(view.evidence.states.values() if method.needs().states else ()),
        ],
        "features": [] if method.reads == "none" else [view.features],
    }
    spoilt = {
        what: torch.stack([v.isnan().any() for v in vs]) for what, vs in looked_at.items() if vs
    }
    if not spoilt or not bool(torch.cat(list(spoilt.values())).any()):  # one wait for the device
        return
    what = next(what for what, found in spoilt.items() if bool(found.any()))
    raise UnsupportedInputError(
        f"{method.name} cannot choose tokens: the vision tower's {what} hold NaN. {NAN_REMEDY}"
    )


def _counts(stage: Stage, group: Group) -> list[int]:
    method, keep, b = stage.method, stage.keep, group.features.shape[0]
    if isinstance(keep, AutoKeep):
        if isinstance(method, AdaptiveCompressor):
            return method.counts(group)
        assert isinstance(method, TokenPruner)  # `build` lets no other through
        scores, outliers = method.score(group), group.evidence.outliers
        scores = scores if outliers is None else scores.masked_fill(outliers, 0)
        return auto_count(scores, keep.tau).tolist()
    return [method.tokens_kept(group.current_segments, keep)] * b


def _evidence_for(method: TokenCompressor, group: Group, depth: int | None) -> Group:
    """The group with exactly the evidence the method asked for, in the order of its layers."""
    needs, have = method.needs(), group.evidence
    if not needs.layers:
        return group
    evidence = dataclasses.replace(
        have,
        cls_attention=_rows(needs.cls_attention, have.cls_attention, depth),
        received_attention=_rows(needs.received_attention, have.received_attention, depth),
        keys=_rows(needs.keys, have.keys, depth),
        wide_cls_attention=_rows(needs.wide_cls_attention, have.wide_cls_attention, depth),
        states=_rows(needs.states, have.states, depth),
    )
    return dataclasses.replace(group, evidence=evidence)


def _rows(
    layers: Sequence[Layer], captured: Mapping[int, Tensor], depth: int | None
) -> dict[int, Tensor]:
    """What was captured of some layers, in their order."""
    if not layers:
        return {}
    assert depth is not None  # evidence was captured, so there is a tower
    return {i: captured[i] for i in (resolve_layer(layer, depth) for layer in layers)}


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
