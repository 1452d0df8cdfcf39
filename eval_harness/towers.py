"""Time of a vision tower alone under methods inside it.

The ideal is each block alone on the rows that a method leaves it, in the tower's own kernel, with
nothing computed to choose them. A block that loses rows between its attention and its MLP counts
as if it had begun with fewer, so that no method can pass its ideal but by noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from eval_harness import machine, shapes
from eval_harness.clock import Clock, ClockKind
from eval_harness.rounds import Sample, interleave, summary
from eval_harness.stages import tower_of
from eval_harness.subject import NONE, Keep, under
from vlmcompress.core.errors import ConfigError, UnsupportedModelError
from vlmcompress.families.bare import SUPPORTED_BARE, BareFamily, bare_family_of
from vlmcompress.families.towers import Tower
from vlmcompress.loading import location
from vlmcompress.methods import pipeline

_IDLE = ("tome_tower", 0.5)  # for a patch that is never used


def bench_tower(
    tower: nn.Module,
    pixels: Tensor,
    configs: Sequence[tuple[str, Keep]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    progress: Callable[[str], None] | None = None,
    clock: ClockKind = "wall",
) -> dict[str, Any]:
    """Time a tower under each configuration against itself without.

    Args:
        tower: a vision transformer without a language model, as `patch` takes it.
        pixels: [b, 3, height, width], on its device and in its dtype.
        configs: (method inside the tower, keep) pairs; the method `none` is the tower once more.
        repeats: timed rounds; each runs every side once, in an order that alternates.
        warmup: rounds that are thrown away.
        progress: called with a line of text now and then.
        clock: `wall`, or `cpu` for processor time.

    Returns:
        JSON-ready: `machine`, `protocol`, `batch` and `configs`, one entry per pair with `seconds`
        and `baseline` (summaries), `images_per_second`, `speedup`, `ideal_ratio`, `patches` (after
        every block), and `flops` of the blocks by formula, `before` and `after`.

    Raises:
        ConfigError: without configurations or rounds.
        UnsupportedModelError: for what is no vision tower that the library knows.
    """
    if not configs or repeats < 1 or warmup < 0:
        raise ConfigError(
            f"bench_tower needs configurations, repeats >= 1 and warmup >= 0; got {len(configs)} "
            f"configurations, repeats={repeats}, warmup={warmup}."
        )
    from vlmcompress import patch

    family = bare_family_of(tower)
    if family is None or family.own_tower is None:
        raise UnsupportedModelError(
            f"{type(tower).__name__} is no vision transformer that stands alone; those are "
            f"{SUPPORTED_BARE}."
        )
    first = next((config for config in configs if config[0] != NONE), _IDLE)
    say = progress or (lambda line: None)
    where, blocks = _described(tower, pixels), _Blocks(tower, family.own_tower, family, pixels)
    rows = []
    with patch(tower, first[0], keep=first[1]) as handle:
        for method, keep in configs:
            say(f"{method} at keep {keep}")
            one = _Side(tower, pixels, handle, Clock(pixels.device, clock), method, keep)
            rows.append(one.run(blocks, repeats, warmup))
    return {
        "machine": where,
        "protocol": {"repeats": repeats, "warmup": warmup, "clock": clock},
        "batch": len(pixels),
        "image_size": list(pixels.shape[:1:-1]),
        "configs": rows,
    }


def _described(tower: Any, pixels: Tensor) -> dict[str, Any]:
    config = getattr(tower, "config", None)
    return {
        **machine.environment(),
        "device": machine.device_name(pixels.device),
        "dtype": str(pixels.dtype).removeprefix("torch."),
        "attention": {"tower": str(getattr(config, "_attn_implementation", "its own"))},
        "shape": machine.name_of(tower),
    }


class _Blocks:
    """The tower's blocks, each with the arguments that it was called with in a full pass."""

    def __init__(self, model: nn.Module, tower: Tower, family: BareFamily, pixels: Tensor) -> None:
        host = model.get_submodule(family.tower_path)
        self.extra = int(tower.has_cls) + tower.registers
        self._axis = 1 if tower.batch_first else 0
        self._calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        hooks = [
            block.register_forward_pre_hook(
                lambda module, args, kwargs: self._calls.append((module, args, kwargs)),
                with_kwargs=True,
            )
            for block in tower.layers(host)
        ]
        try:
            call(model, pixels)
        finally:
            for hook in hooks:
                hook.remove()

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def rows(self) -> int:
        """Rows of the first block."""
        _, (hidden, *_), _ = self._calls[0]
        return int(hidden.shape[self._axis])

    @torch.no_grad()
    def run(self, rows: Sequence[int]) -> None:
        """Every block on the first rows of what it saw."""
        for (block, (hidden, *others), kwargs), n in zip(self._calls, rows, strict=True):
            block(hidden.narrow(self._axis, 0, n), *others, **kwargs)


@torch.no_grad()
def call(tower: Any, pixels: Tensor) -> Any:
    """One pass of a tower, or of the image half of a CLIP model."""
    for name in ("get_image_features", "encode_image"):
        if hasattr(tower, name):
            return getattr(tower, name)(pixels)
    return tower(pixels)


class _Side:
    """One configuration beside the tower without it."""

    def __init__(
        self, tower: Any, pixels: Tensor, handle: Any, clock: Clock, method: str, keep: Keep
    ) -> None:
        self.tower, self.pixels, self.handle, self.clock = tower, pixels, handle, clock
        self.method, self.keep = method, keep

    def run(self, blocks: _Blocks, repeats: int, warmup: int) -> dict[str, Any]:
        """Everything that is reported of this configuration."""
        with under(self.handle, self.method, self.keep):
            call(self.tower, self.pixels)
            last = None if self.method == NONE else self.handle.last
        whole = [blocks.rows - blocks.extra] * len(blocks)
        patches = list(last.tower_patches) if last is not None and last.tower_patches else whole
        rows = self._rows(patches, whole[0], blocks.extra)
        samples = interleave(
            {
                "baseline": lambda: self._time(NONE),
                "method": lambda: self._time(self.method),
                "ideal": lambda: {"seconds": self.clock.time(lambda: blocks.run(rows))},
            },
            repeats,
            warmup,
        )
        before, after, ideal = ([row["seconds"] for row in samples[name]] for name in samples)
        return {
            "method": self.method,
            "keep": self.keep,
            "seconds": summary(after),
            "baseline": summary(before),
            "images_per_second": len(self.pixels) * len(after) / sum(after),
            "speedup": median(b / a for b, a in zip(before, after, strict=True)),
            "ideal_ratio": median(a / i for a, i in zip(after, ideal, strict=True)),
            "patches": patches,
            "flops": None
            if last is None
            else {"before": last.tower_flops_before, "after": last.tower_flops},
        }

    def _time(self, method: str) -> Sample:
        with under(self.handle, method, self.keep):
            return {"seconds": self.clock.time(lambda: call(self.tower, self.pixels))}

    def _rows(self, after: Sequence[int], whole: int, extra: int) -> list[int]:
        """Rows of each block under the ideal."""
        built = None if self.method == NONE else pipeline.build(self.method, keep=1).tower
        late = built is not None and built.method.place == "after"
        patches = [whole, *after][:-1] if late else after
        return [n + extra for n in patches]


def subject(
    name: str, shape: bool, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, Tensor]:
    """A tower alone and one picture of noise for it.

    Args:
        name: of a known shape; a folder or hub id of a vision transformer or a CLIP model, or of a
            VLM, whose tower is then taken out; or `reference`.
        shape: whether `name` is a shape's.
        dtype: of weights and pixels.
        device: where both go.
    """
    tower: Any = shapes.build_tower(name, dtype, device) if shape else _loaded(name)
    tower = tower.to(device, dtype).eval()
    side = getattr(tower.config, "vision_config", tower.config).image_size
    height, width = (side, side) if isinstance(side, int) else side
    noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return tower, noise.to(device, dtype)


def _loaded(name: str) -> Any:
    """A checkpoint's vision transformer.

    Raises:
        UnsupportedModelError: when transformers cannot load it.
    """
    from transformers import AutoModel

    where = location(name)
    try:
        model: Any = AutoModel.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{name!r} cannot be loaded: {error}") from error
    if bare_family_of(model) is None:
        model = tower_of(model) or model
    model.name_or_path = name
    return model
