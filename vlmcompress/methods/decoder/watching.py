"""Looking at the rows around every layer without leaving: what early exits are fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmcompress.methods.decoder.exiting import LayerExit
from vlmcompress.methods.ops.similarity import agreement
from vlmcompress.methods.tower.exiting import TowerExit


class _Watch:
    """What was seen since it was last taken."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, Tensor, Tensor]] = []

    def saw(self, layer: int, before: Tensor, after: Tensor) -> Tensor:
        """Remember a layer; nothing leaves."""
        self._seen.append((layer, agreement(before, after).cpu(), after.detach()))
        return torch.zeros(len(before), dtype=torch.bool, device=before.device)

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """Of each pass: [layers, B] similarities and [layers, B, ...] states; forgotten then.

        The last layer is not among them, since nothing can be passed over behind it.
        """
        passes: list[list[tuple[Tensor, Tensor]]] = []
        for layer, similar, state in self._seen:
            if layer == 0:
                passes.append([])
            passes[-1].append((similar, state))
        self._seen = []
        return [
            (torch.stack([similar for similar, _ in one]), torch.stack([state for _, state in one]))
            for one in passes
        ]


class _Watching:
    """What methods that only look have in common."""

    def __post_init__(self) -> None:
        """Begin with nothing."""
        # No field: options are what a configuration is made of.
        object.__setattr__(self, "watch", _Watch())

    def leaves(self, layer: int, depth: int, before: Tensor, after: Tensor) -> Tensor:
        """Never."""
        watch: _Watch = vars(self)["watch"]
        return watch.saw(layer, before, after)

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """Similarities and states of each pass since."""
        watch: _Watch = vars(self)["watch"]
        return watch.take()


@dataclass(frozen=True)
class LayerWatch(_Watching, LayerExit):
    """Never leaves the language model, and remembers how alike rows are.

    It is no method of the registry: an instance belongs to one model and is read with `take`.
    """

    name: ClassVar[str] = "layer_watch"


@dataclass(frozen=True)
class TowerWatch(_Watching, TowerExit):
    """The same in a tower."""

    name: ClassVar[str] = "tower_watch"
