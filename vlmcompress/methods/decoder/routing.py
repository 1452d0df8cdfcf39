"""The contract of methods that let tokens pass by layers: `LayerRouter`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from vlmcompress.methods.decoder.base import DecoderState, LayerMethod


@dataclass(frozen=True)
class Route:
    """Which rows a layer works on.

    Attributes:
        keep: [B, L] bool, rows that it does; all text must.
        weight: [B, L] what the layer adds to each visual row is multiplied by this.
    """

    keep: Tensor
    weight: Tensor


class LayerRouter(LayerMethod):
    """Inside the LLM: in some layers only a part of the visual tokens is worked on.

    The others pass by unchanged and meet the next layer in their old places. Such a layer's cache
    holds what it worked on.
    """

    @abstractmethod
    def routed_layers(self, depth: int) -> tuple[int, ...]:
        """Layers that tokens pass by, ascending; not the first, which caches are measured by.

        Raises:
            ConfigError: for layers that are not there.
        """

    @abstractmethod
    def processed(self, n: int, keep: float | int | None) -> int:
        """Visual tokens of an image with `n` that a routed layer works on.

        Raises:
            ConfigError: without a budget.
        """

    @abstractmethod
    def route(self, layer: int, state: DecoderState, keep: float | int | None) -> Route:
        """The route at `layer`, with as many tokens of each image as `processed` says."""
