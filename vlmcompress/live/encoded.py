"""Compressed images of a call, and the encodings that users keep of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmcompress.core.tokens import Segment
from vlmcompress.live import encodingfile
from vlmcompress.methods.stages import Group


@dataclass(frozen=True)
class Encoded:
    """Compressed images of one call.

    Attributes:
        output: what `get_image_features` returned, `pooler_output` shortened.
        lengths: uncompressed tokens per image.
        kept: per image the kept rows, ascending int64.
        segments: the rectangles of tokens of each image.
        assignments: per image [n] row each uncompressed token went to, -1 where dropped; None if
            untouched.
        evidence_layers: tower layers that were read.
        skipped_layers: tower layers that were not run.
        tower_patches: patches left after each tower layer, where a stage inside it acted.
        tower_keys: keys that a query looked at in each tower layer, where some were left out.
        tower_run: tower layers that were run, where patches may leave early.
        heard: per image [layers + 1, k, d], what its tokens are at the entrance of every layer of
            the language model and behind the last; empty where it did not read images beforehand.
        read: rows of each image that the language model has read in this call.
        whole: per image [n, d], all rows of it, as rows of the language model; empty where nothing
            is made of them at its entrance.
    """

    output: Any
    lengths: tuple[int, ...]
    kept: tuple[Tensor, ...]
    segments: tuple[tuple[Segment, ...], ...]
    assignments: tuple[Tensor | None, ...]
    evidence_layers: tuple[int, ...]
    skipped_layers: int
    tower_patches: tuple[int, ...] = ()
    tower_keys: tuple[int, ...] = ()
    tower_run: int | None = None
    heard: tuple[Tensor, ...] = ()
    read: tuple[int, ...] = ()
    whole: tuple[Tensor, ...] = ()

    @property
    def compressed(self) -> bool:
        """Whether any token was dropped."""
        return any(len(rows) < n for rows, n in zip(self.kept, self.lengths, strict=True))

    @property
    def features(self) -> list[Tensor]:
        """[k, d] of every image; a view where the model wants one tensor, see `pooled`."""
        found = self.output.pooler_output
        rows = found.flatten(0, -2) if isinstance(found, Tensor) else torch.cat(list(found))
        return list(rows.split([len(kept) for kept in self.kept]))


class CompressedEncoding(dict):  # type: ignore[type-arg]
    """`mm_encoder_outputs` made by `Handle.encode`: compressed already, used with full prompts.

    Attributes:
        encoded: the images.
        made_by: what tells the model that encoded them.
    """

    def __init__(self, encoded: Encoded, made_by: Mapping[str, Any] | None = None) -> None:
        super().__init__(image=encoded.output)
        self.encoded, self.made_by = encoded, made_by or {}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, which `Handle.load_encoding` reads.

        Raises:
            CheckpointError: when it cannot be written.
        """
        encodingfile.save(self.encoded, self.made_by, path)


def pooled(features: list[Tensor], stacked: bool) -> Tensor | list[Tensor]:
    """Rows of images ([k, d] each) as a model wants them.

    Args:
        features: of every image.
        stacked: whether it wants one tensor.
    """
    if not stacked:
        return features
    equal = len({len(rows) for rows in features}) == 1
    return torch.stack(features) if equal else torch.cat(features)


def fresh_output(output: Any) -> Any:
    """A shallow copy whose `pooler_output` may change: `generate` expands it in place for beams."""
    return type(output)(**dict(output.items()))


def by_owner(groups: Sequence[Group]) -> list[tuple[Group, int]]:
    """(group, row) of every image, in the order of the images."""
    places = [(group, i) for group in groups for i in range(len(group.owner))]
    return sorted(places, key=lambda place: int(place[0].owner[place[1]]))


def collected(
    output: Any, groups: Sequence[Group], layers: tuple[int, ...], skipped: int
) -> Encoded:
    """What a call's images came to.

    Args:
        output: what `get_image_features` returned; its `pooler_output` is shortened.
        groups: the images.
        layers: tower layers that were read.
        skipped: tower layers that were not run.
    """
    places = by_owner(groups)
    features = [group.features[i] for group, i in places]
    output.pooler_output = pooled(features, isinstance(output.pooler_output, Tensor))
    return Encoded(
        output=output,
        lengths=tuple(group.n_full for group, _ in places),
        kept=tuple(group.index[i].sort().values for group, i in places),
        segments=tuple(group.segments for group, _ in places),
        assignments=tuple(None if g.assignment is None else g.assignment[i] for g, i in places),
        evidence_layers=layers,
        skipped_layers=skipped,
    )
