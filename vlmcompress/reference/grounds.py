"""Grounds that no question asks about: cluttered grey ones, and natural-looking landscapes."""

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


_DETAIL = 56  # side of the noise fields that a landscape is made of
_TINTS = np.array(
    [  # pale sky, mist, foliage, dry grass, earth, rock: far from every object colour
        (168, 184, 200),
        (186, 184, 178),
        (84, 100, 74),
        (150, 142, 108),
        (112, 94, 78),
        (126, 124, 122),
    ],
    np.float32,
)


def _rough(rng: np.random.Generator, slope: float) -> np.ndarray:
    """Noise ``[56, 56]`` of unit deviation whose amplitude falls with frequency as in nature."""
    down, across = np.fft.fftfreq(_DETAIL), np.fft.rfftfreq(_DETAIL)
    frequency = np.hypot(down[:, None], across[None])
    frequency[0, 0] = np.inf  # no mean
    white = np.fft.rfft2(rng.standard_normal((_DETAIL, _DETAIL)))
    field = np.fft.irfft2(white / frequency**slope, s=(_DETAIL, _DETAIL))
    return field / field.std()


def landscape(rng: np.random.Generator) -> np.ndarray:
    """Draw a natural-looking ground: sky, a ridge, and land in patches, with 1/f texture.

    Args:
        rng: source of all randomness.

    Returns:
        ``[224, 224, 3]`` uint8.
    """
    above, below, other = _TINTS[[rng.integers(2), *rng.choice([2, 3, 4, 5], 2, replace=False)]]
    height = np.arange(_DETAIL)[:, None] / _DETAIL
    ridge = rng.uniform(0.15, 0.5) + 0.06 * _rough(rng, 1.5)[:1]
    land = 1 / (1 + np.exp((ridge - height) * 60))
    patches = 1 / (1 + np.exp(-4 * _rough(rng, 1.2)))[..., None]
    soil = below * patches + other * (1 - patches)
    light = 1 + 0.12 * _rough(rng, 1.0) * (0.3 + 0.7 * land) - 0.15 * height * (1 - land)
    picture = (above * (1 - land[..., None]) + soil * land[..., None]) * light[..., None]
    small = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return np.array(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
