"""T2T: overlapping windows of patches become tokens inside the tower (arXiv 2101.11986)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, unfold

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.methods.learned import Learned, check_weights, fresh
from vlmcompress.methods.ops import cells, schedules
from vlmcompress.methods.ops.grid import side_of
from vlmcompress.methods.options import Layer, check_count, check_layers, resolve_layer
from vlmcompress.methods.tower.base import Place, TowerReducer, TowerState, layers_within
from vlmcompress.methods.tower.shape import TowerShape


@dataclass(frozen=True)
class T2T(TowerReducer):
    """Soft split: the map of patches is unfolded in windows that overlap, and each becomes a token.

    A window reaches `overlap` patches beyond its stride (Eq. 3: a kernel of k, an overlap of s and
    a stride of k - s), half of them, rounded up, on its left and above, as in the released code
    (kernel 3, stride 2, padding 1). Where the stride does not divide the side the last windows
    reach beyond the border, so that no patch is lost; the released `unfold` loses some. What the
    paper calls re-structurisation, a transformer layer before each soft split, is the tower's own
    block here: the split follows it.

    Untrained, a token is the mean of its window, of patches inside the map only. The paper
    concatenates them and projects: `learned=True` adds to the mean a projection of the
    concatenated window, of which each patch is brought to `channels` first, 64 as in the paper's
    module. It starts at zero, so that what is untrained equals the mean, and `weights` loads it.
    Rows stay in raster order. A patch counts for the window whose stride it lies in.

    The count is its own: the most windows that are no more than asked for, and of these strides
    the squarest (24 x 24 patches, keep=0.25: stride 2 x 2, kernel 3 x 3, 144 tokens). Several
    splits, as in the paper, need `strides`. Checked against the released code's splits; Eq. 3 and
    the re-structurisation are from memory of the paper.

    Attributes:
        layers: blocks after which patches are split anew.
        strides: of each of these splits, the same both ways, in place of `keep`; the paper's two
            splits between tokens are (2, 2).
        overlap: patches that neighbouring windows share; 1 in the paper between tokens.
        learned: whether there is a projection, to be trained.
        channels: width of each patch in it.
        seed: of the untrained projection.
        weights: file of the trained one; it says `learned` too.
    """

    name: ClassVar[str] = "t2t"
    paper: ClassVar[str] = "https://arxiv.org/abs/2101.11986"
    layers: tuple[Layer, ...] = (0.5,)
    strides: tuple[int, ...] | None = None
    overlap: int = 1
    learned: bool = False
    channels: int = 64
    seed: int = 0
    weights: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, self.layers)
        check_count(self.name, "overlap", self.overlap, 0)
        check_count(self.name, "channels", self.channels)
        check_count(self.name, "seed", self.seed, 0)
        check_weights(self.name, self.weights)
        if not isinstance(self.learned, bool):
            raise ConfigTypeError(f"t2t's learned is {self.learned!r}; it must be True or False.")
        if self.strides is None:
            if len(self.layers) > 1:
                raise ConfigError(
                    "t2t splits once by keep; for several layers give strides=(2, 2), for example."
                )
            return
        if not isinstance(self.strides, tuple):
            raise ConfigTypeError(f"t2t's strides are {self.strides!r}; give a tuple of ints.")
        for stride in self.strides:
            check_count(self.name, "stride", stride, 2)
        if len(self.strides) != len(self.layers):
            raise ConfigError(
                f"t2t has {len(self.strides)} stride(s) for {len(self.layers)} layer(s); give one "
                "for each."
            )

    @property
    def place(self) -> Place:
        """After the block."""
        return "after"

    @property
    def own_budget(self) -> bool:
        """With strides."""
        return self.strides is not None

    def tokens_kept(self, n: int, keep: float | int) -> int:
        """Windows, at most the count asked for.

        Raises:
            ConfigError: for patches that form no square.
        """
        side, k = side_of(self.name, n), keeping.count(keep, n)
        return n if k == n else math.prod(cells.grid(side, cells.fitting(side, k)))

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """All at once, or by the strides."""
        layers = layers_within(self.name, self.layers, depth, last)
        if self.strides is None:
            return schedules.at_layers(n, layers, [self.final(n, keep)], last + 1)
        if len(layers) < len(self.strides):
            raise ConfigError(
                f"t2t's layers {self.layers} fall together in a tower of {depth} layers of which "
                f"layer {last} is read; name others."
            )
        side, left = side_of(self.name, n), []
        for stride in self.strides:
            side = -(-side // stride)
            left.append(side * side)
        return schedules.at_layers(n, layers, left, last + 1)

    @property
    def learns(self) -> bool:
        """With projections."""
        return self.learned or self.weights is not None

    def parts(self, shape: TowerShape) -> Learned | None:
        """The projections of windows, one per split; None when tokens are means."""
        if not self.learns:
            return None
        now, windows = shape.patches, {}
        for layer, left in shape.acting.items():
            windows[str(layer)] = self._window(layer, now, left, shape.depth)
            now = left

        def make() -> Projections:
            return Projections(shape.width, self.channels, self.overlap, windows)

        return fresh(make, self.seed, self.weights)

    def _window(self, layer: int, n: int, k: int, depth: int) -> cells.Size:
        """Stride of the split after `layer`."""
        if self.strides is None:
            return cells.fitting(side_of(self.name, n), k)
        # A share that was moved to the last layer that is read stays behind the others.
        resolved = (resolve_layer(named, depth) for named in self.layers)
        stride = self.strides[sum(other < layer for other in resolved)]
        return stride, stride

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Split anew in `k` windows."""
        first, side = state.cls_rows, side_of(self.name, state.patches)
        stride = self._window(layer, state.patches, k, state.depth)
        x = state.hidden[:, first:].float().transpose(1, 2)
        x = x.reshape(*x.shape[:2], side, side)
        tokens = window_means(x, stride, self.overlap)
        if self.learns:
            tokens = tokens + state.learnt(Projections)(str(layer), x)
        b, device = len(tokens), tokens.device
        cls = torch.arange(first, device=device).expand(b, -1)
        named = cells.centres(side, stride, device) + first
        owner = cells.owners(side, stride, device) + first
        hidden = tokens.flatten(2).transpose(1, 2).to(state.hidden.dtype)
        return state.regroup(
            torch.cat([state.hidden[:, :first], hidden], 1),
            torch.cat([cls, named.expand(b, -1)], 1),
            torch.cat([cls, owner.expand(b, -1)], 1),
        )


class Projections(Learned):
    """What the windows of each split add to their means.

    Args:
        width: of the tower's states.
        channels: of a patch inside a window.
        overlap: patches that windows share.
        windows: {layer: stride} of the splits.
    """

    def __init__(
        self, width: int, channels: int, overlap: int, windows: dict[str, cells.Size]
    ) -> None:
        super().__init__(
            method="t2t", width=width, channels=channels, overlap=overlap, strides=windows
        )
        self._overlap, self._windows = overlap, windows
        self.narrow, self.widen = nn.ModuleDict(), nn.ModuleDict()
        for layer, stride in windows.items():
            places = math.prod(length + overlap for length in stride)
            self.narrow[layer] = nn.Linear(width, channels)
            self.widen[layer] = nn.Linear(channels * places, width)
            nn.init.zeros_(self.widen[layer].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.widen[layer].bias)  # type: ignore[arg-type]

    def forward(self, layer: str, x: Tensor) -> Tensor:
        """Of a map ([b, width, side, side] float32) to windows ([b, width, rows, columns])."""
        stride = self._windows[layer]
        narrow: Tensor = self.narrow[layer](x.movedim(1, -1)).movedim(-1, 1)
        kernel = stride[0] + self._overlap, stride[1] + self._overlap
        windows = unfold(_padded(narrow, stride, self._overlap), kernel, stride=stride)
        tokens: Tensor = self.widen[layer](windows.transpose(1, 2)).transpose(1, 2)
        return tokens.reshape(*tokens.shape[:2], *cells.grid(x.shape[-1], stride))


def window_means(x: Tensor, stride: cells.Size, overlap: int) -> Tensor:
    """Means of windows that reach `overlap` beyond their stride: [b, c, rows, columns].

    Args:
        x: [b, c, side, side]; what lies beyond its border does not count.
        stride: (height, width).
        overlap: half of it, rounded up, lies on the left and above.
    """
    kernel = [length + overlap for length in stride]

    def sums(values: Tensor) -> Tensor:
        values = _padded(values, stride, overlap)
        return avg_pool2d(values, kernel, stride, divisor_override=1)

    return sums(x) / sums(x.new_ones(1, 1, *x.shape[2:]))


def _padded(x: Tensor, stride: cells.Size, overlap: int) -> Tensor:
    """With zeros around it, so that windows cover all of it and are as many as strides."""
    side, before = x.shape[-1], -(-overlap // 2)
    rows, columns = (-side % length + overlap - before for length in stride)
    return pad(x, (before, columns, before, rows))
