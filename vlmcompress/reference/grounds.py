"""Cluttered grounds: grey texture, strokes and blobs that no question asks about."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SIDE = 224


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Two octaves of smooth grey noise, ``[SIDE, SIDE]`` float32."""
    level = rng.uniform(95, 160)
    total = np.full((SIDE, SIDE), level, np.float32)
    for cells, amplitude in ((7, 22), (40, 12)):
        coarse = rng.uniform(-amplitude, amplitude, (cells, cells)).astype(np.float32)
        smooth = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        total += np.asarray(smooth)
    return total


def _muted(rng: np.random.Generator) -> tuple[int, int, int]:
    """A dull colour, far from every object colour."""
    shade = rng.integers(55, 200)
    red, green, blue = (int(v) for v in np.clip(shade + rng.integers(-16, 17, 3), 0, 255))
    return red, green, blue


def ground(rng: np.random.Generator) -> np.ndarray:
    """Draw one ground.

    Args:
        rng: source of all randomness.

    Returns:
        ``[224, 224, 3]`` uint8.
    """
    tint = rng.uniform(-8, 8, 3).astype(np.float32)
    base = np.clip(_texture(rng)[..., None] + tint, 0, 255).astype(np.uint8)
    canvas = Image.fromarray(base)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 9)):
        points = rng.integers(-10, SIDE + 10, 6).tolist()
        draw.line(points, fill=_muted(rng), width=int(rng.integers(1, 5)))
    for _ in range(rng.integers(2, 8)):
        x, y = rng.integers(-8, SIDE, 2).tolist()
        w, h = rng.integers(6, 30, 2).tolist()
        draw.ellipse((x, y, x + w, y + h), fill=_muted(rng))
    return np.array(canvas)
