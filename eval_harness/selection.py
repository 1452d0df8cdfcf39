"""How long methods take to choose tokens, beside the tower that makes them.

Every method's `compress` runs on random features with random evidence of the kinds it asks for, as
many as a ViT-L/14 with 336 pixels makes of an image in `tiles` views; the tower with random weights
runs on as many. All take turns in one process. A share is the median over rounds of the method's
time over the tower's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from eval_harness import machine, shapes
from eval_harness.clock import Clock, ClockKind
from eval_harness.rounds import Sample, Side, interleave, summary
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import Evidence, Segment, VisualTokens
from vlmcompress.methods import TokenCompressor, registry
from vlmcompress.methods.base import Layer, Needs, resolve_layer

BOUND = 0.05
"""Share of the tower's time that selection should stay below."""

_QUESTION = 768  # width of CLIP's joint space


@dataclass(frozen=True)
class TowerOutput:
    """What a tower makes of one image, drawn at random.

    Attributes:
        views: of the image: the whole of it and its tiles.
        side: patches along either side of a view.
        width: of a state.
        heads: of an attention layer.
        depth: layers.
        dtype: of states and keys.
        device: where all of it lies.
        seed: of the draw.
    """

    views: int
    side: int
    width: int
    heads: int
    depth: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    @classmethod
    def of(cls, tower: Any, views: int) -> TowerOutput:
        """Of the shape of a CLIP vision model."""
        c = tower.config
        side = c.image_size // c.patch_size
        heads, depth = c.num_attention_heads, c.num_hidden_layers
        return cls(views, side, c.hidden_size, heads, depth, tower.dtype, tower.device)

    @property
    def patches(self) -> int:
        """Of a view."""
        return self.side**2

    @property
    def n(self) -> int:
        """Tokens of the image."""
        return self.views * self.patches

    def tokens(self, needs: Needs) -> VisualTokens:
        """One image with the evidence that is asked for."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        def rows(layers: tuple[Layer, ...], heads: int) -> dict[int, Tensor]:
            drawn = {resolve_layer(layer, self.depth): draw(1, heads, self.n) for layer in layers}
            return {layer: row.softmax(-1) for layer, row in drawn.items()}

        head = self.width // self.heads
        keys = {
            resolve_layer(layer, self.depth): draw(1, self.n, self.heads, head).to(self.dtype)
            for layer in needs.keys
        }
        evidence = Evidence(
            cls_attention=rows(needs.cls_attention, self.heads),
            received_attention=rows(needs.received_attention, self.heads),
            keys=keys,
            text=draw(1, 1, _QUESTION) if needs.text else None,
            wide_cls_attention=rows(needs.wide_cls_attention, 1),
            cls_features=draw(1, self.width).to(self.dtype) if needs.cls_features else None,
            patches=draw(1, self.n, _QUESTION) if needs.text else None,
        )
        return VisualTokens.from_features(
            draw(1, self.n, self.width).to(self.dtype),
            segments=self._segments(),
            tile=torch.arange(self.views).repeat_interleave(self.patches),
            evidence=evidence,
        )

    def _segments(self) -> tuple[Segment, ...]:
        grid = (1, self.side, self.side)
        starts = range(0, self.n, self.patches)
        return tuple(
            Segment("tile" if start else "base", grid, slice(start, start + self.patches))
            for start in starts
        )


def methods() -> list[str]:
    """Built-in methods between tower and LLM that need no weights of their own."""
    created = {name: registry.create(name) for name in registry.names()}
    return [
        name
        for name, method in created.items()
        if isinstance(method, TokenCompressor) and method.training_free
    ]


def measure(
    names: Sequence[str],
    keeps: Sequence[float | int | str],
    *,
    shape: str = "llava-1.5-7b",
    views: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    repeats: int = 5,
    warmup: int = 1,
    clock: ClockKind = "wall",
    progress: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Time the selection of methods, and the tower.

    Args:
        names: registered methods that act between tower and LLM.
        keeps: fractions or counts of the image's tokens.
        shape: one of `shapes.names()`, whose tower is run.
        views: of the image.
        dtype: of the tower and what it makes; selection computes in float32 whatever it is.
        device: of both.
        repeats: rounds that count.
        warmup: rounds before them.
        clock: `wall`, or `cpu` for processor time of one thread.
        progress: called after each timed call.

    Returns:
        JSON-ready `machine`, `protocol`, `tower` (seconds) and `methods`, one entry per method and
        keep: seconds, `share` of the tower's and whether that is below the bound.

    Raises:
        ConfigError: without methods, budgets or rounds, for a keep that is no number and for
            methods of other stages.
    """
    if not names or not keeps or repeats < 1 or warmup < 0:
        raise ConfigError(
            "Selection is timed for methods and budgets, with repeats >= 1 and warmup >= 0; got "
            f"{len(names)} methods, {len(keeps)} budgets, repeats={repeats}, warmup={warmup}."
        )
    tower: Any = shapes.build_tower(shape, dtype, device)
    output, timer = TowerOutput.of(tower, views), Clock(tower.device, clock)

    def timed(call: Callable[[], Any]) -> Sample:
        with torch.inference_mode():
            sample = {"seconds": timer.time(call)}
        if progress is not None:
            progress()
        return sample

    size = output.side * int(tower.config.patch_size)
    pixels = torch.randn(views, 3, size, size, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(tower.device, dtype)
    sides: dict[str, Side] = {"": lambda: timed(lambda: tower(pixels))}
    for name in names:
        for keep in keeps:
            sides[f"{name} {keep}"] = _selecting(_method(name), _number(keep), output, timed)
    samples = interleave(sides, repeats, warmup)
    base = [sample["seconds"] for sample in samples[""]]
    return {
        "machine": {
            **machine.describe(tower),
            "attention": {"tower": tower.config._attn_implementation},
            "shape": shape,
        },
        "protocol": {
            "repeats": repeats,
            "warmup": warmup,
            "clock": clock,
            "views": views,
            "tokens": output.n,
            "width": output.width,
            "keeps": list(keeps),
            "bound": BOUND,
        },
        "tower": summary(base),
        "methods": [
            {"method": name, "keep": keep, **_against(samples[f"{name} {keep}"], base)}
            for name in names
            for keep in keeps
        ],
    }


def _method(name: str) -> TokenCompressor:
    method = registry.create(name)
    if not isinstance(method, TokenCompressor):
        raise ConfigError(
            f"{name} acts in the stage {method.stage!r} and selects nothing from a tower's output; "
            f"allowed are {', '.join(methods())}."
        )
    return method


def _number(keep: float | int | str) -> float | int:
    if isinstance(keep, str):
        raise ConfigError(f"Selection is timed at a keep of {keep!r}; allowed are numbers.")
    return keep


def _selecting(
    method: TokenCompressor,
    keep: float | int,
    output: TowerOutput,
    timed: Callable[[Callable[[], Any]], Sample],
) -> Side:
    tokens = output.tokens(method.needs())
    return lambda: timed(lambda: method.compress(tokens, keep))


def _against(samples: list[Sample], base: list[float]) -> dict[str, Any]:
    seconds = [sample["seconds"] for sample in samples]
    share = median(s / b for s, b in zip(seconds, base, strict=True))
    return {"seconds": summary(seconds), "share": share, "within": share < BOUND}
