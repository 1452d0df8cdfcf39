"""Cluttered grounds: grey texture, strokes and blobs that no question asks about."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SIDE = 224


def _texture(rng: np.random.Generator) -> Image.Image:
    """Two octaves of smooth grey noise with a slight tint, enlarged."""
    broad = rng.uniform(-22, 22, (7, 7)).astype(np.float32)
    enlarged = Image.fromarray(broad).resize((40, 40), Image.Resampling.BILINEAR)
    grey = np.asarray(enlarged) + rng.uniform(-12, 12, (40, 40)) + rng.uniform(95, 160)
    small = Image.fromarray((grey[..., None] + rng.uniform(-8, 8, 3)).astype(np.uint8))
    return small.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def _muted(rng: np.random.Generator) -> tuple[int, int, int]:
    """A dull colour, far from every object colour."""
    shade = rng.integers(55, 200)
    red, green, blue = (shade + rng.integers(-16, 17, 3)).tolist()
    return red, green, blue


def ground(rng: np.random.Generator) -> np.ndarray:
    """Draw one ground.

    Args:
        rng: source of all randomness.

    Returns:
        ``[224, 224, 3]`` uint8.
    """
    canvas = _texture(rng)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 9)):
        points = rng.integers(-10, SIDE + 10, 6).tolist()
        draw.line(points, fill=_muted(rng), width=int(rng.integers(1, 5)))
    for _ in range(rng.integers(2, 8)):
        x, y = rng.integers(-8, SIDE, 2).tolist()
        w, h = rng.integers(6, 30, 2).tolist()
        draw.ellipse((x, y, x + w, y + h), fill=_muted(rng))
    return np.array(canvas)
