"""The contract of trained compressors between tower and LLM: `LearnedCompressor`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import Segment
from vlmcompress.methods.base import FeatureSpace, TokenCompressor
from vlmcompress.methods.learned import Learned, check_weights
from vlmcompress.methods.ops.grid import nearest_grid
from vlmcompress.methods.options import check_count
from vlmcompress.methods.parts import Partition
from vlmcompress.methods.pretrained import Pretrained

#: How far a grid's sides may differ in shape from the image's for the sake of an exact count.
_STRETCH = 2.0


@dataclass(frozen=True)
class ConnectorShape:
    """What trained parts between tower and LLM are made for.

    Attributes:
        width: of the rows that come in: the tower's states, or rows of the LLM where the connector
            cannot be parted from the tower.
        out: width of the LLM's rows.
        levels: tower layers whose states come in besides.
        grid: (height, width) in tokens of the images that the tower was made for, or of one tile;
            None where it does not tell.
        tokens: left of such an image; None where the shape of images decides.
        state_width: of those states; None where none come in.
        first_layers: makes copies of that many of the LLM's first layers, float32, which run under
            masks of [B, 1, L, L]; None where nobody asks for them.
    """

    width: int
    out: int
    levels: int
    grid: tuple[int, int] | None
    tokens: int | None
    state_width: int | None = None
    first_layers: Callable[[int], list[nn.Module]] | None = None


@dataclass(frozen=True)
class LearnedCompressor(Pretrained, TokenCompressor):
    """Fewer tokens by trained weights, which stand beside the model as `handle.parts`.

    Nothing is bypassed: also where as many tokens come out as went in, they are other ones.

    Attributes:
        tokens: left of each image or tile, in place of `keep`.
        seed: of untrained weights.
        weights: file of the trained ones.
        placeless: whether rows see the whole image and stand for no part of it.
    """

    placeless: ClassVar[bool] = False

    training_free: ClassVar[bool] = False
    reads: ClassVar[FeatureSpace] = "tower"
    partition: ClassVar[Partition] = Partition(scope="tile")
    tokens: int | None = None
    seed: int = 0
    weights: str | None = None

    def __post_init__(self) -> None:
        """Check the options that all have."""
        if self.tokens is not None:
            check_count(self.name, "tokens", self.tokens, 1)
        check_count(self.name, "seed", self.seed, 0)
        check_weights(self.name, self.weights)

    @property
    def own_keep(self) -> int | None:
        """`tokens`."""
        return self.tokens

    @property
    def learns(self) -> bool:
        """It does."""
        return True

    @abstractmethod
    def parts(self, shape: ConnectorShape) -> Learned | None:
        """What the method learns, from its file or untrained; None where there is nothing to learn.

        Raises:
            CheckpointError: for a file that cannot be used.
            ConfigError: for one made for something else, or a shape that no parts can be made for.
        """


def rectangle(method: str, segments: Sequence[Segment]) -> tuple[int, int]:
    """(height, width) of an image's or tile's tokens, frames of a video one below the other.

    Raises:
        ConfigError: for several rectangles.
    """
    if len(segments) != 1:
        raise ConfigError(
            f"{method} works on one rectangle of tokens at a time and got {len(segments)}; use "
            "scope='tile'."
        )
    t, h, w = segments[0].grid
    return t * h, w


def cell_grid(size: tuple[int, int], k: int) -> tuple[int, int]:
    """(rows, columns) of the cells that k tokens stand for.

    Exactly k where a grid of so many cells is not stretched to more than twice the shape of the
    image, else the nearest in shape with at most k (as `pool`).

    Args:
        size: (height, width) of the image in tokens.
        k: tokens, at least 1.
    """
    h, w = size
    if k >= h * w:
        return size
    exact = [(r, k // r) for r in range(1, h + 1) if k % r == 0 and k // r <= w]
    stretch = [max(r * w / (c * h), c * h / (r * w)) for r, c in exact]
    if exact and min(stretch) <= _STRETCH:
        return exact[stretch.index(min(stretch))]
    _, rows, columns = nearest_grid((1, h, w), k)
    return rows, columns
