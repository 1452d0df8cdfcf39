"""SiT: patches are softly aggregated in fewer tokens by trained weights (arXiv 2111.12624)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.methods.learned import Learned, check_weights, fresh
from vlmcompress.methods.ops import schedules
from vlmcompress.methods.ops.grid import centres
from vlmcompress.methods.options import Layer, check_count, check_layers, check_number
from vlmcompress.methods.tower.base import Place, TowerReducer, TowerState, layers_within
from vlmcompress.methods.tower.shape import TowerShape


@dataclass(frozen=True)
class SiT(TowerReducer):
    """Token slimming: after some blocks k trained slots each take a weighted mean of all patches.

    The weights of a slot are the softmax over patches of a small perceptron of their states (TSM):
    Z = A X with A = softmax(scale * W2 gelu(W1 norm(X))) over the patches. [CLS] goes on as it is.
    It needs training: the weights drawn by `seed` are near to uniform, and every slot is then near
    to the mean of the image. `weights` loads trained ones, and `handle.parts` are what to train.

    A slimmed token mixes all patches and has no place. Slot i stands at the i-th of k evenly spaced
    patches in every image, so that slots keep their order and their positions, as in the paper; the
    patches that weigh most in it are counted for it, and the patch at its place always.

    `reverse=True` adds the module that makes all patches of the slimmed ones again (RTSM), for
    feature recalibration distillation: `recalibration_loss(handle.parts, slimmed, dense)` compares
    them with those of the tower unpatched. It is for training only and never runs in a pass. The
    paper compares after every block from the first slimming on; here it is what leaves the tower.

    TSM, RTSM, the loss and the places of slimming (LV-ViT-S: after 9, 12 and 14 of 16 blocks, half
    of the tokens each) were checked against the released code.

    Attributes:
        layers: blocks after which patches are slimmed.
        ratio: share kept by each of them, rounded down as published, in place of `keep`.
        hidden: width of the perceptron, as a share of the tower's.
        reverse: whether there is a module that reverses the slimming, to train with.
        seed: of the untrained weights.
        weights: file of the trained ones.
    """

    name: ClassVar[str] = "sit"
    paper: ClassVar[str] = "https://arxiv.org/abs/2111.12624"
    training_free: ClassVar[bool] = False
    looks_at: ClassVar[tuple[str, ...]] = ("features",)
    layers: tuple[Layer, ...] = (0.5, 0.6875, 0.8125)
    ratio: float | None = None
    hidden: float = 0.5
    reverse: bool = False
    seed: int = 0
    weights: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_layers(self.name, self.layers)
        check_count(self.name, "seed", self.seed, 0)
        check_weights(self.name, self.weights)
        for option, value in (("ratio", self.ratio), ("hidden", self.hidden)):
            if value is None:
                continue
            check_number(self.name, option, value, 0, 4 if option == "hidden" else 1)
            if value == 0:
                raise ConfigError(f"sit's {option} is 0; it must be above.")
        if not isinstance(self.reverse, bool):
            raise ConfigTypeError(f"sit's reverse is {self.reverse!r}; it must be True or False.")

    @property
    def place(self) -> Place:
        """After the block."""
        return "after"

    @property
    def own_budget(self) -> bool:
        """With a ratio."""
        return self.ratio is not None

    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """Geometric over the layers; by `ratio`, the published counts."""
        layers = layers_within(self.name, self.layers, depth, last)
        if self.ratio is None:
            k = self.final(n, keep)
            left = [max(k, m) for m in schedules.geometric(n, k, len(layers))]
        else:
            left = [max(1, int(n * self.ratio ** (i + 1))) for i in range(len(layers))]
        return schedules.at_layers(n, layers, left, last + 1)

    @property
    def learns(self) -> bool:
        """Always."""
        return True

    def parts(self, shape: TowerShape) -> Slimming:
        """One slimming module per layer that slims, and what reverses them if it is wanted."""
        hidden = max(1, int(shape.width * self.hidden))
        patches = shape.patches if self.reverse else None

        def make() -> Slimming:
            return Slimming(shape.width, hidden, shape.acting, patches)

        return fresh(make, self.seed, self.weights)

    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """Slim down to `k` tokens."""
        first = state.cls_rows
        weights = state.learnt(Slimming).weights(layer, state.hidden[:, first:])
        if weights.shape[1] != k:
            raise ConfigError(
                f"sit's module of layer {layer} makes {weights.shape[1]} tokens, and {k} are "
                f"wanted of this image ({state.patches} patches); give images of the size that it "
                "was made for."
            )
        slimmed = (weights @ state.hidden[:, first:].float()).to(state.hidden.dtype)
        named, owner = _named(weights.detach())
        cls = torch.arange(first, device=owner.device).expand(len(owner), -1)
        return state.regroup(
            torch.cat([state.hidden[:, :first], slimmed], 1),
            torch.cat([cls, named + first], 1),
            torch.cat([cls, owner + first], 1),
        )


class Slimming(Learned):
    """Token slimming modules, and their reverse.

    Args:
        width: of the tower's states.
        hidden: of the perceptrons.
        slots: {layer: tokens} after each layer that slims.
        patches: that the reverse makes again; None without one.
    """

    def __init__(
        self, width: int, hidden: int, slots: Mapping[int, int], patches: int | None
    ) -> None:
        names = {str(layer): k for layer, k in slots.items()}
        super().__init__(method="sit", width=width, hidden=hidden, slots=names, reverse=patches)
        self.slots = nn.ModuleDict(
            {name: TokenSlimming(width, hidden, k) for name, k in names.items()}
        )
        self.reverse = None
        if patches is not None and names:
            self.reverse = ReverseSlimming(width, [*names.values()][-1], patches)

    def weights(self, layer: int, x: Tensor) -> Tensor:
        """[b, slots, n] weights of patches ([b, n, width]) after `layer`, in float32."""
        if str(layer) not in self.slots:
            raise ConfigError(
                f"sit has no module for layer {layer}, only for {', '.join(self.slots)}; give "
                "images of the size that it was made for."
            )
        weights: Tensor = self.slots[str(layer)](x.float())
        return weights

    def recalibrate(self, slimmed: Tensor) -> Tensor:
        """All patches, [b, patches, width], of what leaves the tower ([b, slots, width]).

        Raises:
            ConfigError: without a reverse.
        """
        if self.reverse is None:
            raise ConfigError("These parts hold no reverse of the slimming; use sit(reverse=True).")
        made: Tensor = self.reverse(slimmed.float())
        return made


class TokenSlimming(nn.Module):
    """TSM: the weight of every patch in every slot."""

    def __init__(self, width: int, hidden: int, slots: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, slots)
        self.scale = nn.Parameter(torch.ones(1))
        _as_released(self.up, self.down)

    def forward(self, x: Tensor) -> Tensor:
        """[b, slots, n] of patches ([b, n, width]), each slot's summing to 1."""
        logits: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x)))) * self.scale
        return logits.softmax(1).transpose(1, 2)


class ReverseSlimming(nn.Module):
    """RTSM: patches from slots, by a perceptron over slots and one over channels."""

    ratio = 4  #: width of the perceptrons over what they give

    def __init__(self, width: int, slots: int, patches: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.places = _perceptron(slots, self.ratio * patches, patches)
        self.channels = _perceptron(width, self.ratio * width, width)

    def forward(self, slimmed: Tensor) -> Tensor:
        """[b, patches, width] of [b, slots, width]."""
        x = self.places(self.norms[0](slimmed).transpose(1, 2)).transpose(1, 2)
        made: Tensor = x + self.channels(self.norms[1](x))
        return made


def recalibration_loss(parts: Learned | None, slimmed: Tensor, dense: Tensor) -> Tensor:
    """How far the patches made again of slimmed ones are from those of the whole tower.

    Args:
        parts: of a `sit(reverse=True)`, as `handle.parts`.
        slimmed: [b, slots, width] what leaves the slimmed tower.
        dense: [b, patches, width] what leaves the tower unpatched; it is the teacher and gets no
            gradient.

    Raises:
        ConfigTypeError: for parts of another method.
        ConfigError: for parts without a reverse, or other patches than it makes.
    """
    if not isinstance(parts, Slimming):
        raise ConfigTypeError(
            f"Slimming is reversed by parts of 'sit', not by {type(parts).__name__}; pass "
            "handle.parts of a model patched with sit(reverse=True)."
        )
    made = parts.recalibrate(slimmed)
    if made.shape != dense.shape:
        raise ConfigError(
            f"The reverse makes {tuple(made.shape)} and the whole tower gives "
            f"{tuple(dense.shape)}; compare patches of the same images, without [CLS]."
        )
    return mse_loss(made, dense.detach().float())


def _named(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The patch that each slot stands at, [b, k], and the slot of each patch, [b, n]."""
    b, k, n = weights.shape
    places = torch.tensor(centres(n, k), device=weights.device).expand(b, -1)
    own = torch.arange(k, device=weights.device).expand(b, -1)
    return places, weights.argmax(1).scatter(1, places, own)


def _perceptron(width: int, hidden: int, out: int) -> nn.Sequential:
    up, down = nn.Linear(width, hidden), nn.Linear(hidden, out)
    _as_released(up, down)
    return nn.Sequential(up, nn.GELU(), down)


def _as_released(*linears: nn.Linear) -> None:
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
