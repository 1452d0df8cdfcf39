"""Images that were cut into tiles: a method sees one part at a time, and newlines are seen to.

A part is what a budget is for: one view of the image, or all of them. Methods know nothing of it;
to them a part is an image of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import Segment, VisualTokens

Scope: TypeAlias = Literal["tile", "image", "prompt"]
Newlines: TypeAlias = Literal["kept", "dropped", "candidates"]
SCOPES: tuple[Scope, ...] = ("tile", "image", "prompt")
Sections: TypeAlias = Callable[[int, bool], Sequence[int]]
NEWLINES: tuple[Newlines, ...] = ("kept", "dropped", "candidates")


@dataclass(frozen=True)
class Partition:
    """What a budget is for, and how the tokens of an image cut into tiles are put before a method.

    Attributes:
        scope: what one budget is for: `tile` (each view of the image), `image` (all together) or
            `prompt` (all images of a row of the batch, which get their shares before any pixel is
            seen; within an image all views are together).
        newlines: what becomes of newline rows: `kept` beside the budget, `dropped`, or
            `candidates` like any other token (of the whole image).
    """

    scope: Scope = "tile"
    newlines: Newlines = "dropped"

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            ConfigError: for unknown values, or candidates that belong to no tile.
        """
        if self.scope not in SCOPES:
            raise ConfigError(f"scope is {self.scope!r}; allowed are {', '.join(SCOPES)}.")
        if self.newlines not in NEWLINES:
            raise ConfigError(f"newlines is {self.newlines!r}; allowed are {', '.join(NEWLINES)}.")
        if self.scope == "tile" and self.newlines == "candidates":
            raise ConfigError(
                "newlines='candidates' needs scope='image' or 'prompt': a newline belongs to no "
                "tile."
            )

    def columns(self, tile: Tensor) -> list[Tensor]:
        """Rows of each part, from the view ([n], -1 for newlines) that each row shows."""
        if self.scope != "tile":
            everything = torch.ones_like(tile, dtype=torch.bool)
            return [(everything if self.newlines == "candidates" else tile >= 0).nonzero()[:, 0]]
        return [(tile == view).nonzero()[:, 0] for view in range(int(tile.max()) + 1)]

    def left_over(self, tile: Tensor) -> Tensor:
        """Rows that stay whatever the method does."""
        if self.newlines == "kept":
            return (tile < 0).nonzero()[:, 0]
        return tile.new_zeros(0)

    def candidates(self, group: VisualTokens) -> list[int]:
        """Tokens of each image among which a budget of the image chooses."""
        if group.tile is None or self.newlines == "candidates":
            return [group.n] * len(group.features)
        return (group.tile[group.index] >= 0).sum(1).tolist()


def in_parts(group: VisualTokens) -> bool:
    """Whether a group's images were cut into tiles or hold newlines."""
    return group.tile is not None


def run_in_parts(
    group: VisualTokens,
    partition: Partition,
    spares: Callable[[VisualTokens], bool],
    run: Callable[[VisualTokens], list[VisualTokens]],
    sections: Sections | None = None,
) -> list[VisualTokens]:
    """Apply a method to every part of every image, and put the parts together again.

    Args:
        group: images of one layout.
        partition: what the parts are.
        spares: whether the method would leave a part untouched; if it spares all of them, the
            images stay as they are, newlines included.
        run: the method, from one part of some images to groups of equal length.
        sections: for a method whose rows come in an order of their own, `TokenCompressor.sections`.

    Returns:
        Groups of equal length.
    """
    out = []
    for images, tile in _alike(group):
        columns = [c for c in partition.columns(tile) if len(c)]
        parts = [_part(images, tile, c) for c in columns]
        if all(spares(part) for part in parts):
            out.append(images)
            continue
        pieces = [_by_owner(run(part)) for part in parts]
        out += _joined(images, columns, pieces, partition.left_over(tile), sections)
    return out


def _alike(group: VisualTokens) -> list[tuple[VisualTokens, Tensor]]:
    """Images whose rows show the same views, and which those are ([n])."""
    assert group.tile is not None  # `in_parts` has seen to it
    if group.assignment is None:
        return [(group, group.tile)]
    patterns: dict[tuple[int, ...], list[int]] = {}
    for i, pattern in enumerate(group.tile[group.index].tolist()):
        patterns.setdefault(tuple(pattern), []).append(i)
    return [
        (group.take_units(torch.tensor(units)), group.tile.new_tensor(pattern))
        for pattern, units in patterns.items()
    ]


def _part(images: VisualTokens, tile: Tensor, columns: Tensor) -> VisualTokens:
    """Some rows of every image, as images of their own."""
    rows = columns.expand(len(images.features), -1)
    return dataclasses.replace(
        VisualTokens.from_features(
            images.features[:, columns],
            segments=_rectangle(images, columns),
            owner=images.owner,
            tile=_views(tile[columns]),
            evidence=images.evidence.select(rows),
        ),
        mass=images.mass[:, columns],
    )


def _views(tile: Tensor) -> Tensor | None:
    """Which view each row of a part shows; None for a single one, which is an image of its own."""
    return tile if bool((tile != tile[0]).any()) else None


def _rectangle(images: VisualTokens, columns: Tensor) -> tuple[Segment, ...] | None:
    """The rectangle that a part fills; None where it fills none."""
    if images.n < images.n_full:
        return None
    n = len(columns)
    whole = [s for s in images.segments if s.slice.start == int(columns[0]) and s.length == n]
    if whole and int(columns[-1]) == whole[0].slice.stop - 1:
        return (dataclasses.replace(whole[0], slice=slice(0, n)),)
    # Rows of a tile lie apart in the map of tiles: at least a newline is between them.
    starts = (columns.diff() > 1).nonzero()[:, 0] + 1
    height = len(starts) + 1
    even = torch.arange(1, height, device=starts.device) * (n // height)
    if n % height or not torch.equal(starts, even):
        return None
    return (Segment("tile", (1, height, n // height), slice(0, n)),)


@dataclass(frozen=True)
class _Piece:
    """What a method left of one part of one image.

    Attributes:
        features: [k, d]. source: [k] row of the part that represents each.
        moved: [m] row of the piece that each row of the part became part of, -1 where dropped.
    """

    features: Tensor
    source: Tensor
    moved: Tensor


def _by_owner(groups: Sequence[VisualTokens]) -> dict[int, _Piece]:
    pieces = {}
    for group in groups:
        for i, owner in enumerate(group.owner.tolist()):
            moved = (
                torch.arange(group.n_full, device=group.index.device)
                if group.assignment is None
                else group.assignment[i]
            )
            pieces[owner] = _Piece(group.features[i], group.index[i], moved)
    return pieces


def _joined(
    images: VisualTokens,
    columns: Sequence[Tensor],
    pieces: Sequence[dict[int, _Piece]],
    left_over: Tensor,
    sections: Sections | None,
) -> list[VisualTokens]:
    """Images made of their pieces and of the rows that stay, those of equal length in one group.

    The rows of a single piece keep the method's order; several are put in spatial order, section
    by section.
    """
    made: dict[int, list[tuple[int, Tensor, Tensor, Tensor]]] = {}
    for i, owner in enumerate(images.owner.tolist()):
        mine = [piece[owner] for piece in pieces]
        moved = left_over.new_full((images.n,), -1)
        first = 0
        for where, piece in zip(columns, mine, strict=True):
            moved[where] = torch.where(piece.moved < 0, piece.moved, piece.moved + first)
            first += len(piece.source)
        moved[left_over] = first + torch.arange(len(left_over), device=moved.device)
        source = [where[piece.source] for where, piece in zip(columns, mine, strict=True)]
        features = torch.cat([p.features for p in mine] + [images.features[i, left_over]])
        rows = torch.cat([*source, left_over])
        if len(mine) > 1 or len(left_over):
            order = _order(images, i, rows, mine, sections)
            number = torch.empty_like(order).scatter_(
                0, order, torch.arange(len(order), device=order.device)
            )
            moved = torch.where(moved < 0, moved, number[moved.clamp(min=0)])
            features, rows = features[order], rows[order]
        made.setdefault(len(rows), []).append((i, features, rows, moved))
    return [
        images.take_units(torch.tensor([i for i, *_ in same])).regroup(
            torch.stack([features for _, features, _, _ in same]),
            torch.stack([rows for _, _, rows, _ in same]),
            torch.stack([moved for *_, moved in same]),
        )
        for same in made.values()
    ]


def _order(
    images: VisualTokens, i: int, rows: Tensor, pieces: Sequence[_Piece], sections: Sections | None
) -> Tensor:
    """[k] the order of image i's rows ([k]): those of its pieces, then those that stay."""
    places = images.index[i, rows]
    if sections is None:
        return places.argsort(stable=True)
    assert images.tile is not None  # `in_parts` has seen to it
    section, first = torch.zeros_like(places), 0
    for piece in pieces:
        k = len(piece.source)
        if k < len(piece.moved):  # a part that the method left alone is in spatial order
            whole = int(images.tile[places[first]]) == 0
            section[first : first + k] = section.new_tensor(sections(k, whole))
        first += k
    order = torch.where(section == 0, places, 0).argsort(stable=True)
    return order[section[order].argsort(stable=True)]
