"""VideoLLM-MoD: a learned router per layer chooses the visual tokens that the layer works on.

https://arxiv.org/abs/2408.16730
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.base import Layer
from vlmcompress.methods.decoder.base import DecoderShape, DecoderState
from vlmcompress.methods.decoder.prunevid_llm import best_of_each, groups_of
from vlmcompress.methods.decoder.routing import LayerRouter, Route
from vlmcompress.methods.learned import Learned, check_weights, fresh
from vlmcompress.methods.options import check_count, check_layers, resolve_layer


@dataclass(frozen=True)
class MoD(LayerRouter):
    """Mixture of depths for visual tokens: in every other layer most of them pass by.

    A linear router (the paper's LayerExpert) weighs the tokens that come into a layer; of each
    frame, or image, the share `keep` (published: 0.2) with the largest weights goes through its
    attention and MLP, and what those add is multiplied by the weight, so that gradient reaches the
    router. The others go on as they are. Without trained routers and a model trained along with
    them, the weights are those of chance and ruin what layers add.

    The authors have published no code. They speak of interleaved layers; here these are the odd
    ones, so that the first layer sees all.

    Attributes:
        layers: with a router, none of them 0; every second one, from 1 on, when not given.
        seed: of the untrained routers.
        weights: file of the trained ones.
    """

    name: ClassVar[str] = "mod"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.16730"
    training_free: ClassVar[bool] = False
    looks_at: ClassVar[str] = "features before its layers"
    layers: tuple[Layer, ...] | None = None
    seed: int = 0
    weights: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.layers is not None:
            check_layers(self.name, self.layers)
        check_count(self.name, "seed", self.seed, 0)
        check_weights(self.name, self.weights)

    @property
    def learns(self) -> bool:
        """Always."""
        return True

    def parts(self, shape: DecoderShape) -> Routers:
        """A router per layer."""
        layers = self.routed_layers(shape.depth)
        return fresh(lambda: Routers(layers, shape.width), self.seed, self.weights).eval()

    def routed_layers(self, depth: int) -> tuple[int, ...]:
        """The layers named, or the odd ones."""
        if self.layers is None:
            return tuple(range(1, depth, 2))
        # A share stands for layer 1 at least, where small models round it down to 0.
        return tuple(
            sorted({max(resolve_layer(n, depth), isinstance(n, float)) for n in self.layers})
        )

    def processed(self, n: int, keep: float | int | None) -> int:
        """The share or count of them."""
        if keep is None:
            raise ConfigError(f"mod has no budget: write 'mod:0.2', for example, for {n} tokens.")
        return keeping.count(keep, n)

    def route(self, layer: int, state: DecoderState, keep: float | int | None) -> Route:
        """The tokens of each image with the largest weights; ties go to the earlier one."""
        weight = state.learnt(Routers)(layer, state.hidden)
        with torch.no_grad():
            group, sizes = groups_of(state)
            quota = [[self.processed(n, keep) if n else 0 for n in row] for row in sizes.tolist()]
            best = best_of_each(weight, group, torch.tensor(quota, device=group.device))
        return Route(best | ~state.visual, weight)


class Routers(Learned):
    """A linear router for each layer.

    Args:
        layers: that have one.
        width: of the rows.
    """

    def __init__(self, layers: Sequence[int], width: int) -> None:
        super().__init__(method="mod", layers=layers, width=width)
        self.routers = nn.ModuleDict({str(i): nn.Linear(width, 1, bias=False) for i in layers})

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """[B, L] float32 weights of rows ([B, L, d]) that come into a layer."""
        with torch.autocast(hidden.device.type, enabled=False):
            weights: Tensor = self.routers[str(layer)](hidden.float())
        return weights[..., 0]
