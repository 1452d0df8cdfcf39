"""Zero-shot retrieval of attributes with a CLIP model, against the cost of its image tower.

An image is embedded once by the tower under a method inside it, and compared with one text for
every colour, every shape and every pair of both. A colour, shape or pair that the image shows is
found when its text is nearer to the image than every text of its kind that the image does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from eval_harness import machine, statistics
from vlmcompress.core.errors import ConfigError
from vlmcompress.methods.inside import names_inside
from vlmcompress.reference.scenes import COLOUR_NAMES
from vlmcompress.reference.sprites import SHAPES

_BATCH = 64


class Scene(Protocol):
    """A picture and what is in it; see `vlmcompress.reference.scenes.Drawn`."""

    @property
    def image(self) -> Any:
        """The picture."""

    @property
    def items(self) -> Sequence[Any]:
        """Its objects, with `colour` and `shape`."""


@dataclass(frozen=True)
class Attributes:
    """The texts of one kind.

    Attributes:
        kind: `colour`, `shape` or `pair`.
        texts: one for each.
        of: which of them each object is.
    """

    kind: str
    texts: tuple[str, ...]
    of: Callable[[Any], int]

    def present(self, scene: Scene) -> set[int]:
        """Those that a scene shows; letters and digits have no shape and are left out."""
        return {self.of(item) for item in scene.items if item.shape in SHAPES}


def attributes() -> tuple[Attributes, ...]:
    """Colours, shapes and pairs of the drawn scenes."""
    pairs = tuple(product(COLOUR_NAMES, SHAPES))
    return (
        Attributes(
            "colour",
            tuple(f"the {colour} object" for colour in COLOUR_NAMES),
            lambda item: COLOUR_NAMES.index(item.colour),
        ),
        Attributes(
            "shape",
            tuple(f"the {shape}" for shape in SHAPES),
            lambda item: SHAPES.index(item.shape),
        ),
        Attributes(
            "pair",
            tuple(f"{'an' if c == 'orange' else 'a'} {c} {s}" for c, s in pairs),
            lambda item: pairs.index((item.colour, item.shape)),
        ),
    )


def retrieve(
    model: nn.Module,
    processor: Any,
    head: Any,
    scenes: Sequence[Scene],
    *,
    methods: Sequence[str] = (),
    keeps: Sequence[float | int] = (0.75, 0.5, 0.25, 0.1),
    batch_size: int = _BATCH,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Accuracy of attribute retrieval and FLOPs of the tower's blocks, by method and budget.

    Args:
        model: the reference model, or one of its make, unpatched; its tower is patched and
            unpatched again.
        processor: its processor.
        head: its text head (`vlmcompress.reference.load_text_head()`).
        scenes: pictures with what they show.
        methods: names or spec strings of methods inside the tower; all that learn nothing where not
            given.
        keeps: shares or counts of patches that leave the tower.
        batch_size: images at a time; results do not depend on it.
        seed: of the bootstrap.
        progress: called with a line of text after each configuration.

    Returns:
        JSON-ready: `images`, `questions`, `chance`, `full` and `rows`, each with `accuracy` {mean,
        low, high}, `by_kind`, `flops` per image, `flops_ratio` and `patches` after each layer, and
        of rows `method`, `keep` and `difference` (to the full tower, paired); `seed`, `commit`,
        `machine`.

    Raises:
        ConfigError: without scenes that show anything, or for methods that do not act in a tower.
    """
    kinds = attributes()
    shown = [[kind.present(scene) for kind in kinds] for scene in scenes]
    if not any(any(present) for present in shown):
        raise ConfigError("Retrieval needs scenes with objects; there are none.")
    asked = _Asked.of(shown, kinds)
    run = _Run(model, processor, head, scenes, kinds, batch_size)
    names = tuple(methods) or tuple(names_inside(cls=True))
    full = run.under(None, 1.0)
    right = asked.answers(full.scores)
    results: dict[str, Any] = {
        "images": len(scenes),
        "questions": len(asked.kinds),
        "chance": asked.chance(),
        "full": _row(full, full, asked, right, right, seed),
        "rows": [],
    }
    for name, keep in product(names, keeps):
        found = run.under(name, keep)
        row = _row(found, full, asked, asked.answers(found.scores), right, seed)
        results["rows"].append({"method": name, "keep": keep, **row})
        if progress:
            progress(f"{name} {keep}")
    where = machine.describe(model)
    return {**results, "seed": seed, "commit": where["commit"], "machine": where}


@dataclass(frozen=True)
class _Found:
    """What the tower gave under one configuration.

    Attributes:
        scores: per kind [images, texts] cosines.
        flops: of the blocks, per image.
        patches: left after each layer; empty where all stay.
    """

    scores: tuple[np.ndarray, ...]
    flops: float
    patches: tuple[int, ...]


@dataclass(frozen=True)
class _Run:
    """Embeds all scenes under one configuration after the other."""

    model: nn.Module
    processor: Any
    head: Any
    scenes: Sequence[Scene]
    kinds: tuple[Attributes, ...]
    batch_size: int

    @torch.no_grad()
    def under(self, method: str | None, keep: float | int) -> _Found:
        """Scores of all scenes; None is the full tower."""
        from vlmcompress import patch

        tower: Any = self.model.get_submodule("model.vision_tower")
        images: list[Tensor] = []
        # A method that keeps everything is the tower itself, bit for bit.
        with patch(tower, method or "tome_tower", keep=keep) as handle:
            for pixels in self._pixels():
                pooled = tower(pixels).pooler_output
                images.append(normalize(self.head.visual_projection(pooled.float()), dim=-1))
            last = handle.last
        assert last is not None  # there are scenes
        assert last.tower_flops is not None
        embedded = torch.cat(images)
        scores = (embedded @ self._texts(kind).T for kind in self.kinds)
        return _Found(
            tuple(score.cpu().numpy() for score in scores),
            last.tower_flops / last.batch,
            last.tower_patches,
        )

    def _texts(self, kind: Attributes) -> Tensor:
        embedded: Tensor = self.head.embed_texts(list(kind.texts), self.processor.tokenizer)
        return embedded

    def _pixels(self) -> Iterator[Tensor]:
        weight = next(self.model.parameters())
        for start in range(0, len(self.scenes), self.batch_size):
            images = [scene.image for scene in self.scenes[start : start + self.batch_size]]
            batch = self.processor.image_processor(images=images, return_tensors="pt")
            yield batch["pixel_values"].to(weight.device, weight.dtype)


@dataclass(frozen=True)
class _Asked:
    """One question for every attribute that an image shows.

    Attributes:
        shown: per image and kind, the attributes that are there.
        counts: texts of each kind.
        kinds: [n] kind of each question.
        images: [n] image of each.
    """

    shown: Sequence[Sequence[set[int]]]
    counts: tuple[int, ...]
    kinds: np.ndarray
    images: np.ndarray

    @classmethod
    def of(cls, shown: Sequence[Sequence[set[int]]], kinds: Sequence[Attributes]) -> _Asked:
        questions = [
            (kind.kind, image)
            for image, of_kinds in enumerate(shown)
            for kind, present in zip(kinds, of_kinds, strict=True)
            for _ in present
        ]
        names, images = (np.array(column) for column in zip(*questions, strict=True))
        return cls(shown, tuple(len(kind.texts) for kind in kinds), names, images)

    def answers(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        """[n] whether each attribute beats all that are absent."""
        found = []
        for image, of_kinds in enumerate(self.shown):
            for score, present in zip(scores, of_kinds, strict=True):
                absent = np.delete(score[image], sorted(present))
                found += [bool((score[image, i] > absent).all()) for i in sorted(present)]
        return np.array(found, dtype=float)

    def chance(self) -> float:
        """How often a guess is right: mean over kinds."""
        guesses: dict[int, list[float]] = {}
        for of_kinds in self.shown:
            for kind, (count, present) in enumerate(zip(self.counts, of_kinds, strict=True)):
                guess = 1 / (count - len(present) + 1)
                guesses.setdefault(kind, []).extend([guess] * len(present))
        return float(np.mean([np.mean(values) for values in guesses.values()]))


def _row(
    found: _Found, full: _Found, asked: _Asked, right: np.ndarray, whole: np.ndarray, seed: int
) -> dict[str, Any]:
    """One configuration, JSON-ready."""

    def estimate(values: np.ndarray) -> dict[str, float]:
        return statistics.mean_over_kinds(values, asked.kinds, asked.images, seed=seed).to_dict()

    kinds = dict.fromkeys(asked.kinds.tolist())
    return {
        "accuracy": estimate(right),
        "difference": estimate(right - whole),
        "by_kind": {kind: float(right[asked.kinds == kind].mean()) for kind in kinds},
        "flops": found.flops,
        "flops_ratio": found.flops / full.flops,
        "patches": list(found.patches),
    }


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table for a reader: accuracy (%, interval) and share of FLOPs."""
    header = ["method", "keep", "accuracy", "difference", "colour", "shape", "pair", "FLOPs"]
    lines = [{"method": "full tower", "keep": "", **results["full"]}, *results["rows"]]
    return header, [
        [
            line["method"],
            str(line["keep"]),
            _interval(line["accuracy"]),
            _interval(line["difference"]) if line["keep"] else "",
            *(f"{100 * line['by_kind'][kind]:.1f}" for kind in ("colour", "shape", "pair")),
            f"{line['flops_ratio']:.2f}",
        ]
        for line in lines
    ]


def _interval(estimate: dict[str, float]) -> str:
    low, high = (100 * estimate[end] for end in ("low", "high"))
    return f"{100 * estimate['mean']:.1f} ({low:.1f} to {high:.1f})"
