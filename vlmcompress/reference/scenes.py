"""Drawn scenes: two to seven objects on a cluttered ground, with coverage per patch.

Everything about a scene is a pure function of its split and its index.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlmcompress.core.errors import ConfigError

from .grounds import SIDE, ground
from .sprites import COLOURS, GLYPHS, SHAPES, letter, stencil

PATCH = 16
GRID = SIDE // PATCH
PATCHES = GRID * GRID
SIZES = (22, 26, 30, 36, 42, 48)
GLYPH_SIZE = 42
GLYPH_RATE = 0.8  # of the objects of at least that size carry a letter
OBJECT_SHARE = 0.1  # a patch counts as an object's when at least this share of it is covered
COVERED = (0.08, 0.25)  # share of the patches that objects take
COLOUR_NAMES = tuple(COLOURS)
GLYPH_NAMES = tuple(GLYPHS)
_GAP = 3
_SEEDS_PER_SPLIT = 2**40
_PAINT_STREAM = 5  # keeps the painting's randomness apart from the layout's


class Split(enum.Enum):
    """Disjoint ranges of scene seeds."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2

    @classmethod
    def named(cls, name: Split | str) -> Split:
        """Find a split by its name in lower case.

        Raises:
            ConfigError: for an unknown name.
        """
        if isinstance(name, cls):
            return name
        names = {split.name.lower(): split for split in cls}
        if name not in names:
            raise ConfigError(f"split {name!r}: allowed are {', '.join(names)}")
        return names[str(name)]

    def seed(self, index: int) -> int:
        """Seed of a scene; different splits never share one.

        Raises:
            ConfigError: if ``index`` leaves the range of the split.
        """
        if not 0 <= index < _SEEDS_PER_SPLIT:
            raise ConfigError(f"scene index {index}: allowed are 0 to {_SEEDS_PER_SPLIT - 1}")
        return self.value * _SEEDS_PER_SPLIT + index


@dataclass(frozen=True)
class Stamp:
    """Where an object goes and what it covers."""

    box: tuple[int, int, int]
    alpha: np.ndarray
    shares: np.ndarray
    glyph: str | None
    mark: tuple[slice, slice] | None


@dataclass(frozen=True)
class Item:
    """One drawn object, or one character of a text (shape ``"sign"`` or ``"row"``).

    Attributes:
        colour, shape: names; glyph: a character or None.
        size: side of its box in pixels; x, y: centre in pixels.
        asked: whether questions may single it out; the others are only salient.
        coverage: ``[196]`` share of each patch that it covers.
    """

    colour: str
    shape: str
    glyph: str | None
    size: int
    x: float
    y: float
    asked: bool
    coverage: np.ndarray

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Counted:
    """The group that the scene's count question is about: ``value`` occurs ``count`` times."""

    attribute: str
    value: str
    count: int


@dataclass(frozen=True)
class Drawn:
    """What is in a picture, and the picture, which is painted when first looked at.

    Attributes:
        scene_id: unique over all splits and sorts of scenes.
        items: everything that a patch can show.
    """

    scene_id: int
    items: tuple[Item, ...]

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """The picture, ``[224, 224, 3]`` uint8."""
        raise NotImplementedError

    @property
    def image(self) -> Image.Image:
        """The picture, 224 x 224 RGB."""
        return Image.fromarray(self.pixels)

    @property
    def coverage(self) -> np.ndarray:
        """``[196]`` share of each patch covered by any item."""
        return np.sum([item.coverage for item in self.items], axis=0)

    def unique(self, **attributes: str) -> Item | None:
        """The only item with these attributes, or None."""
        found = [i for i in self.items if all(getattr(i, k) == v for k, v in attributes.items())]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Scene(Drawn):
    """Objects on a cluttered ground.

    Attributes:
        counted: the group that the count question is about.
        stamps: where the objects are, in the order of the items.
    """

    counted: Counted
    stamps: tuple[Stamp, ...]

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """The picture, ``[224, 224, 3]`` uint8."""
        rng = np.random.default_rng([_PAINT_STREAM, self.scene_id])
        canvas = ground(rng)
        paint_stamps(rng, canvas, self.stamps, [item.colour for item in self.items])
        return add_noise(rng, canvas)


def _attributes(rng: np.random.Generator) -> tuple[list[tuple[str, str]], Counted]:
    """Colours and shapes of a scene; one value occurs exactly as often as was drawn first."""
    count = int(rng.integers(1, 5))
    total = int(rng.integers(max(2, count), 8))
    attribute = ("colour", "shape")[rng.integers(2)]
    names = COLOUR_NAMES if attribute == "colour" else SHAPES
    value = names[rng.integers(len(names))]
    pairs = []
    for i in range(total):
        while True:
            pair = (COLOUR_NAMES[rng.integers(8)], SHAPES[rng.integers(6)])
            mine = pair[0] if attribute == "colour" else pair[1]
            if (mine == value) == (i < count):
                break
        pairs.append(pair)
    order = rng.permutation(total)
    return [pairs[i] for i in order], Counted(attribute, value, count)


def _boxes(rng: np.random.Generator, total: int) -> list[tuple[int, int, int]] | None:
    """Boxes ``(left, top, size)`` that do not touch, at any offset to the patch grid."""
    sizes = SIZES[max(0, 6 - total) :] if total < 6 else SIZES[: 12 - total]
    boxes: list[tuple[int, int, int]] = []
    for size in sorted(rng.choice(sizes, total).tolist(), reverse=True):
        for left, top in rng.integers(2, SIDE - size - 1, (40, 2)).tolist():
            if all(
                left + size + _GAP <= x
                or x + s + _GAP <= left
                or top + size + _GAP <= y
                or y + s + _GAP <= top
                for x, y, s in boxes
            ):
                boxes.append((left, top, size))
                break
        else:
            return None
    return [boxes[i] for i in rng.permutation(total)]


def stamp(rng: np.random.Generator, box: tuple[int, int, int], shape: str) -> Stamp:
    """Cut out an object of a shape for a box ``(left, top, size)``; large ones carry letters."""
    size = box[2]
    alpha = stencil(shape, size, float(rng.integers(-2, 3) * 4))
    if size < GLYPH_SIZE or rng.random() > GLYPH_RATE:
        return Stamp(box, alpha, patch_shares(alpha, *box[:2]), None, None)
    glyph = GLYPH_NAMES[rng.integers(len(GLYPH_NAMES))]
    ink = letter(glyph)
    down = size // 12 if shape == "triangle" else 0
    top, left = (size - ink.shape[0]) // 2 + down, (size - ink.shape[1]) // 2
    mark = (slice(top, top + ink.shape[0]), slice(left, left + ink.shape[1]))
    alpha = alpha.copy()
    alpha[mark][ink] = 1
    return Stamp(box, alpha, patch_shares(alpha, *box[:2]), glyph, mark)


def _stamps(rng: np.random.Generator, shapes: list[str]) -> tuple[Stamp, ...]:
    """Place the objects, again and again until they cover neither too little nor too much."""
    while True:
        boxes = _boxes(rng, len(shapes))
        if boxes is None:
            continue
        stamps = tuple(stamp(rng, box, shape) for box, shape in zip(boxes, shapes, strict=True))
        taken = (np.sum([s.shares for s in stamps], axis=0) >= OBJECT_SHARE).mean()
        if COVERED[0] <= taken <= COVERED[1]:
            return stamps


def patch_shares(alpha: np.ndarray, left: int, top: int) -> np.ndarray:
    """Share of each patch that an alpha mask ``[h, w]`` at a place covers, ``[196]`` float32."""
    height, width = alpha.shape
    x0, y0 = left // PATCH, top // PATCH
    x1, y1 = -(-(left + width) // PATCH), -(-(top + height) // PATCH)
    window = np.zeros(((y1 - y0) * PATCH, (x1 - x0) * PATCH), np.float32)
    dy, dx = top - y0 * PATCH, left - x0 * PATCH
    window[dy : dy + height, dx : dx + width] = alpha
    shares = np.zeros((GRID, GRID), np.float32)
    blocks = window.reshape(y1 - y0, PATCH, x1 - x0, PATCH)
    shares[y0:y1, x0:x1] = blocks.mean(axis=(1, 3))
    return shares.reshape(-1)


def _salient_only(rng: np.random.Generator, total: int) -> set[int]:
    """Indices of the objects that no question singles out: up to a third of them."""
    spare = int(rng.integers(0, total // 3 + 1)) if total >= 4 else 0
    return set(rng.permutation(total)[:spare].tolist())


def surface(
    rng: np.random.Generator, colour: str, height: int, width: int
) -> tuple[np.ndarray, int]:
    """Paint a surface in its own shade of a colour, lit from one side.

    Returns:
        ``[height, width, 3]`` float32, and the grey level of characters on it: dark on light
        colours, light on dark ones.
    """
    base = np.array(COLOURS[colour], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
    dim, bright = rng.uniform(0.88, 1.1, 2)
    light = np.linspace(dim, bright, height, dtype=np.float32)
    paint = np.clip(base * light[:, None, None], 0, 255).repeat(width, axis=1)
    return paint, 15 if base @ np.array([0.3, 0.59, 0.11], np.float32) > 120 else 245


def _paint(rng: np.random.Generator, stamp: Stamp, colour: str) -> np.ndarray:
    """Colours of one object, ``[size, size, 3]`` float32."""
    size = stamp.box[2]
    paint, ink = surface(rng, colour, size, size)
    if stamp.glyph is not None:
        paint[stamp.mark][letter(stamp.glyph)] = ink
    return paint


def stamped(pair: tuple[str, str], cut: Stamp, asked: bool) -> Item:
    """The object of a colour and a shape that a stamp cuts out."""
    left, top, size = cut.box
    x, y = left + size / 2, top + size / 2
    return Item(*pair, cut.glyph, size, x, y, asked, cut.shares)


def paint_stamps(
    rng: np.random.Generator, canvas: np.ndarray, stamps: tuple[Stamp, ...], colours: list[str]
) -> None:
    """Paint objects on a ground, in place."""
    for stamp, colour in zip(stamps, colours, strict=True):
        left, top, size = stamp.box
        view = canvas[top : top + size, left : left + size]
        alpha = stamp.alpha[..., None]
        view[:] = (view * (1 - alpha) + _paint(rng, stamp, colour) * alpha).astype(np.uint8)


def add_noise(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """The noise of a sensor, a few grey levels."""
    noise = rng.integers(0, 256, canvas.shape, dtype=np.uint8) & 7
    return np.clip(canvas, 4, 251) + noise - 4


def scene(split: Split | str, index: int) -> Scene:
    """Draw a scene.

    Args:
        split: a `Split` or its name in lower case.
        index: number of the scene in its split.

    Returns:
        The same scene for the same arguments, always.
    """
    seed = Split.named(split).seed(index)
    rng = np.random.default_rng(seed)
    pairs, counted = _attributes(rng)  # before the places, so that no rejection tilts the answers
    spare = _salient_only(rng, len(pairs))
    stamps = _stamps(rng, [shape for _, shape in pairs])
    items = [
        stamped(pair, cut, i not in spare)
        for i, (pair, cut) in enumerate(zip(pairs, stamps, strict=True))
    ]
    return Scene(seed, tuple(items), counted, stamps)
