"""What each patch of a scene shows: the dense supervision of the tower."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scenes import COLOUR_NAMES, GLYPH_NAMES, GRID, OBJECT_SHARE, PATCH, PATCHES, SIDE, Drawn
from .sprites import CHARACTERS, SHAPES

CHARACTER_NAMES = tuple(CHARACTERS)
BLANK = len(CHARACTER_NAMES)  # glyph class of an object without a character
PAIRS = len(COLOUR_NAMES) * len(SHAPES)
CLS_LABELS = PAIRS + len(COLOUR_NAMES) + len(SHAPES) + len(GLYPH_NAMES)
_rows, _columns = np.divmod(np.arange(PATCHES), GRID)
PATCH_CENTRES = (np.stack([_columns, _rows], axis=1) * PATCH + PATCH / 2).astype(np.float32)
_CENTRE_WEIGHT = 3.0


@dataclass(frozen=True)
class PatchLabels:
    """Labels of one scene, one row per patch; -1 marks the ground (and texts, which have no shape).

    Attributes:
        colour, shape, glyph: class ids ``[196]``. share: ``[196]`` covered share.
        where: ``[196, 2]`` centre of the patch's object (of the patch on the ground), in [-1, 1].
        centre: ``[196]`` bool, the object's centre lies in this patch.
        attention: ``[196]`` distribution that [CLS] should have; every object has the same part.
        present: ``[CLS_LABELS]`` which pairs, colours, shapes and letters the image shows.
        item: ``[196]`` index of the object, -1 on the ground.
    """

    colour: np.ndarray
    shape: np.ndarray
    glyph: np.ndarray
    share: np.ndarray
    where: np.ndarray
    centre: np.ndarray
    attention: np.ndarray
    present: np.ndarray
    item: np.ndarray


def _present(ids: np.ndarray) -> np.ndarray:
    """Multi-hot [CLS] labels from ``[items, 3]`` colour, shape and glyph ids; digits have none."""
    hot = np.zeros(CLS_LABELS, np.float32)
    shaped = ids[ids[:, 1] >= 0]
    hot[shaped[:, 0] * len(SHAPES) + shaped[:, 1]] = 1
    hot[PAIRS + ids[:, 0]] = 1
    hot[PAIRS + len(COLOUR_NAMES) + shaped[:, 1]] = 1
    lettered = ids[ids[:, 2] < len(GLYPH_NAMES), 2]
    hot[PAIRS + len(COLOUR_NAMES) + len(SHAPES) + lettered] = 1
    return hot


def patch_labels(scene: Drawn) -> PatchLabels:
    """Label every patch of a scene with the item that covers most of it."""
    shares = np.stack([item.coverage for item in scene.items])
    ids = np.array(
        [
            (
                COLOUR_NAMES.index(item.colour),
                SHAPES.index(item.shape) if item.shape in SHAPES else -1,
                CHARACTER_NAMES.index(item.glyph) if item.glyph else BLANK,
            )
            for item in scene.items
        ]
    )
    points = np.array([(item.x, item.y) for item in scene.items], np.float32)
    owner = shares.argmax(axis=0)
    ground = shares.max(axis=0) < OBJECT_SHARE
    owner_or_ground = np.where(ground, -1, owner)
    where = np.where(ground[:, None], PATCH_CENTRES, points[owner]) / (SIDE / 2) - 1
    column, row = (points // PATCH).astype(int).T
    is_centre = np.zeros_like(shares, dtype=bool)
    is_centre[np.arange(len(ids)), row * GRID + column] = True
    target = shares * (shares >= OBJECT_SHARE) * (1 + _CENTRE_WEIGHT * is_centre)
    target = (target / target.sum(axis=1, keepdims=True)).mean(axis=0)
    colour, shape, glyph = (np.where(ground, -1, ids[owner, i]) for i in range(3))
    return PatchLabels(
        colour,
        shape,
        glyph,
        share=shares.sum(axis=0).astype(np.float32),
        where=where.astype(np.float32),
        centre=is_centre.any(axis=0) & ~ground,
        attention=target.astype(np.float32),
        present=_present(ids),
        item=owner_or_ground,
    )
