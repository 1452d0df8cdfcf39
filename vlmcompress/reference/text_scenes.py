"""Text-heavy scenes: signs and small tables on natural-looking grounds.

A sign carries a word that is drawn letter by letter, so that no answer can be guessed from its
beginning. A table has three or four rows, each in a colour of its own, with a letter and a number.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .grounds import SIDE, landscape
from .scenes import (
    COLOUR_NAMES,
    GLYPH_NAMES,
    Drawn,
    Item,
    Split,
    Stamp,
    add_noise,
    paint_stamps,
    patch_shares,
    stamp,
    stamped,
    surface,
)
from .sprites import DIGITS, SHAPES, letter

LETTERS = (3, 4)  # shortest and longest word
ROWS = (3, 4)
SIGN, ROW = "sign", "row"  # what stands in place of a shape
_CELL = 27  # height of a character with its margins, in pixels
_PITCH = {SIGN: 18, ROW: 26}  # width of a character with its margins
_MARGIN = 4  # of a sign, beside its word
_BYSTANDERS = (22, 26, 30)  # sizes of the plain objects beside the texts
_GAP = 4
_SCALE = 3
_STREAM, _PAINT_STREAM = 11, 13  # keep the randomness apart from that of the other scenes
_FIRST_ID = 2**44  # the scenes of objects are numbered below


@dataclass(frozen=True)
class Strip:
    """One coloured strip of characters: a sign, or a row of a table.

    Attributes:
        sort: ``"sign"`` or ``"row"``. colour: its name. text: its characters.
        left, top: corner in pixels.
        first: index of its first character among the scene's items; the others follow.
    """

    sort: str
    colour: str
    text: str
    left: int
    top: int
    first: int

    @property
    def width(self) -> int:
        """Pixels."""
        return _width(self.sort, self.text)

    @property
    def members(self) -> tuple[int, ...]:
        """Indices of its characters among the scene's items."""
        return tuple(range(self.first, self.first + len(self.text)))


@dataclass(frozen=True)
class TextScene(Drawn):
    """Signs, maybe a table, and up to two plain objects.

    Attributes:
        signs, rows: the strips; their characters are the scene's first items.
        stamps: the plain objects.
    """

    signs: tuple[Strip, ...]
    rows: tuple[Strip, ...]
    stamps: tuple[Stamp, ...]

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """The picture, ``[224, 224, 3]`` uint8."""
        rng = np.random.default_rng([_PAINT_STREAM, self.scene_id])
        canvas = landscape(rng)
        for strip in (*self.signs, *self.rows):
            _paint(rng, canvas, strip)
        bystanders = self.items[len(self.items) - len(self.stamps) :]
        paint_stamps(rng, canvas, self.stamps, [item.colour for item in bystanders])
        return add_noise(rng, canvas)


def _width(sort: str, text: str) -> int:
    return len(text) * _PITCH[sort] + 2 * _MARGIN * (sort == SIGN)


def _paint(rng: np.random.Generator, canvas: np.ndarray, strip: Strip) -> None:
    """Paint a strip and its characters, in place."""
    paint, ink = surface(rng, strip.colour, _CELL, strip.width)
    paint[[0, -1]] *= 0.7  # an edge, so that rows and grounds of one colour stay apart
    paint[:, [0, -1]] *= 0.7
    for i, character in enumerate(strip.text):
        mask = letter(character, _SCALE)
        x = _character_left(strip, i) - strip.left + (_PITCH[strip.sort] - mask.shape[1]) // 2
        y = (_CELL - mask.shape[0]) // 2
        paint[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = ink
    canvas[strip.top : strip.top + _CELL, strip.left : strip.left + strip.width] = paint


def _character_left(strip: Strip, i: int) -> int:
    return strip.left + _MARGIN * (strip.sort == SIGN) + i * _PITCH[strip.sort]


def _places(rng: np.random.Generator, sizes: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Corners ``(left, top)`` of rectangles ``(width, height)`` that do not touch, or None."""
    placed: list[tuple[int, int, int, int]] = []
    for w, h in sizes:
        for _ in range(40):
            left = int(rng.integers(2, SIDE - w - 1))
            top = int(rng.integers(2, SIDE - h - 1))
            if all(
                left + w + _GAP <= x
                or x + v + _GAP <= left
                or top + h + _GAP <= y
                or y + u + _GAP <= top
                for x, y, v, u in placed
            ):
                placed.append((left, top, w, h))
                break
        else:
            return None
    return [(left, top) for left, top, _, _ in placed]


def _texts(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """What the signs and the rows say: two signs, or a sign and a table, or a table alone."""
    sort = int(rng.integers(3))
    words = []
    for _ in range((2, 1, 0)[sort]):
        picked = rng.integers(len(GLYPH_NAMES), size=rng.integers(LETTERS[0], LETTERS[1] + 1))
        words.append("".join(GLYPH_NAMES[i] for i in picked))
    if sort == 0:
        return words, []
    total = int(rng.integers(ROWS[0], ROWS[1] + 1))
    names = rng.permutation(GLYPH_NAMES)[:total]
    numbers = rng.permutation(tuple(DIGITS))[:total]
    return words, [f"{name}{number}" for name, number in zip(names, numbers, strict=True)]


def _characters(strip: Strip) -> list[Item]:
    items = []
    for i, character in enumerate(strip.text):
        left, pitch = _character_left(strip, i), _PITCH[strip.sort]
        coverage = patch_shares(np.ones((_CELL, pitch), np.float32), left, strip.top)
        x, y = left + pitch / 2, strip.top + _CELL / 2
        items.append(Item(strip.colour, strip.sort, character, _CELL, x, y, True, coverage))
    return items


def _strips(
    words: list[str], rows: list[str], colours: list[str], corners: list[tuple[int, int]]
) -> list[Strip]:
    """Strips at their places; the rows of a table stand under each other."""
    strips: list[Strip] = []
    for i, text in enumerate([*words, *rows]):
        sign = i < len(words)
        left, top = corners[i] if sign else corners[len(words)]
        down = 0 if sign else (i - len(words)) * _CELL
        first = sum(len(strip.text) for strip in strips)
        strips.append(Strip(SIGN if sign else ROW, colours[i], text, left, top + down, first))
    return strips


def text_scene(split: Split | str, index: int) -> TextScene:
    """Draw a text-heavy scene.

    Args:
        split: a `Split` or its name in lower case.
        index: number of the scene in its split.

    Returns:
        The same scene for the same arguments, always.
    """
    seed = Split.named(split).seed(index)
    rng = np.random.default_rng([_STREAM, seed])
    words, rows = _texts(rng)
    colours = rng.permutation(COLOUR_NAMES)[: len(words) + len(rows)].tolist()
    pairs = [
        (COLOUR_NAMES[rng.integers(8)], SHAPES[rng.integers(6)]) for _ in range(rng.integers(3))
    ]
    sizes = [(_width(SIGN, word), _CELL) for word in words]
    if rows:
        sizes.append((_width(ROW, rows[0]), _CELL * len(rows)))
    bystanders = [int(_BYSTANDERS[rng.integers(3)]) for _ in pairs]
    corners = None
    while corners is None:
        corners = _places(rng, sizes + [(size, size) for size in bystanders])
    strips = _strips(words, rows, colours, corners)
    items = [item for strip in strips for item in _characters(strip)]
    stamps = [
        stamp(rng, (left, top, size), shape)
        for (_, shape), (left, top), size in zip(
            pairs, corners[len(sizes) :], bystanders, strict=True
        )
    ]
    items += [stamped(pair, cut, False) for pair, cut in zip(pairs, stamps, strict=True)]
    signs, table = tuple(strips[: len(words)]), tuple(strips[len(words) :])
    return TextScene(_FIRST_ID + seed, tuple(items), signs, table, tuple(stamps))
