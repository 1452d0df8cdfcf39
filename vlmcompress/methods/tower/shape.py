"""The tower and the images that a method's trained parts are made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TowerShape:
    """What a method's trained parts are made for.

    Attributes:
        width: of the tower's states.
        head_dim: width of a head of its attention; None where that does not tell.
        patches: of an image, before any reduction.
        cls_rows: leading rows that are no patches.
        depth: layers of the tower.
        plan: the method's schedule for such images.
    """

    width: int
    head_dim: int | None
    patches: int
    cls_rows: int
    depth: int
    plan: tuple[int, ...]

    @property
    def acting(self) -> dict[int, int]:
        """{layer: patches left after it} for the layers in which patches go."""
        before = (self.patches, *self.plan)
        return {
            layer: left
            for layer, (now, left) in enumerate(zip(before, self.plan, strict=False))
            if left < now
        }
