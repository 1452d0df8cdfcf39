"""Stencils of what is drawn: six shapes, ten letters and nine digits, as alpha masks."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 35, 40),
    "green": (40, 165, 55),
    "blue": (45, 75, 220),
    "yellow": (238, 218, 45),
    "purple": (135, 50, 175),
    "orange": (242, 135, 25),
    "cyan": (55, 205, 215),
    "pink": (248, 145, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
GLYPHS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "V": "10001 10001 10001 10001 01010 01010 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
}
DIGITS = {
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "01110 10000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 00100 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00001 01110",
}
CHARACTERS = {**GLYPHS, **DIGITS}
_OVERSAMPLE = 4


def _outline(shape: str, angle: float) -> list[tuple[float, float]]:
    """Corners of a shape in the unit box, turned by ``angle`` degrees about its centre."""
    if shape == "square":
        corners = [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
    elif shape == "diamond":
        corners = [(0.5, 0.0), (0.92, 0.5), (0.5, 1.0), (0.08, 0.5)]
    elif shape == "triangle":
        corners = [(0.5, 0.02), (1.0, 0.96), (0.0, 0.96)]
    elif shape == "cross":
        low, high = 0.32, 0.68
        corners = [(low, 0), (high, 0), (high, low), (1, low), (1, high), (high, high)]
        corners += [(high, 1), (low, 1), (low, high), (0, high), (0, low), (low, low)]
    else:
        radii = [0.5 if i % 2 == 0 else 0.22 for i in range(10)]
        turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
        corners = [
            (0.5 + r * math.cos(t), 0.5 + r * math.sin(t))
            for r, t in zip(radii, turns, strict=True)
        ]
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return [
        (0.5 + c * (x - 0.5) - s * (y - 0.5), 0.5 + s * (x - 0.5) + c * (y - 0.5))
        for x, y in corners
    ]


@functools.lru_cache(maxsize=1024)
def stencil(shape: str, size: int, angle: float = 0.0) -> np.ndarray:
    """Alpha mask of a shape.

    Args:
        shape: one of `SHAPES`.
        size: side of the box in pixels.
        angle: turn in degrees.

    Returns:
        ``[size, size]`` float32 in [0, 1], read-only.
    """
    side = size * _OVERSAMPLE
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    if shape == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    else:
        draw.polygon([(x * side, y * side) for x, y in _outline(shape, angle)], fill=255)
    mask = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    mask.setflags(write=False)
    return mask


@functools.lru_cache(maxsize=64)
def letter(glyph: str, scale: int = 3) -> np.ndarray:
    """Mask of a letter or digit, ``[7 * scale, 5 * scale]`` bool."""
    rows = [[cell == "1" for cell in row] for row in CHARACTERS[glyph].split()]
    return np.kron(np.array(rows), np.ones((scale, scale), bool))
