"""All methods on the reference model: accuracy in both worlds and position modes, and speed.

A part is one method in one world, with every budget and both position modes on the same questions,
so that a new method costs its own parts alone and every comparison is paired.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from eval_harness import asking, machine
from eval_harness.asking import BLIND_CELL, FULL, FULL_CELL, Asking, Cell
from eval_harness.controls import ORACLES
from eval_harness.paired import World
from eval_harness.provenance import source, versions
from eval_harness.resume import Part, measured
from eval_harness.speed import HOW, SpeedPlan, time_method
from vlmcompress.core.errors import ConfigError, VLMCompressError
from vlmcompress.methods import pipeline, registry
from vlmcompress.reference.study import digest
from vlmcompress.reference.weights import WEIGHTS_DIR
from vlmcompress.reference.worlds import WORLDS

BASELINES = ("random", "uniform", "pool")
RANDOM = "random"
CONTROLS = (*BASELINES, *ORACLES)
"""Rows that are no published method."""

_VARIANTS = tuple(
    f"{name}(exclude_outliers='{kind}')"
    for name in ("vtc_cls", "fastervlm")
    for kind in ("cls", "norm")
)
NEW_TOKENS = 6  # the longest answer, a word, and its end


def default_methods() -> tuple[str, ...]:
    """Baselines, built-in methods that take a keep and need no training, variants, and oracles."""
    kinds = {name: registry.get(name) for name in registry.BUILTIN if name not in BASELINES}
    published = [
        name
        for name, kind in kinds.items()
        if kind.training_free and kind.stage in ("tower", "connector")
    ]
    return (*BASELINES, *filter(_accepted, (*published, *_VARIANTS)), *ORACLES)


def _accepted(spec: str) -> bool:
    try:
        pipeline.build(spec, keep=1)
    except VLMCompressError:
        return False
    return True


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        questions: {world: questions, all kinds alike}.
        methods: names, spec strings and controls.
        keeps: budgets.
        positions: modes.
        seeds: runs of random methods.
        seed: of random methods and of the bootstrap.
        batch: questions at a time.
        split: where questions come from.
    """

    questions: dict[str, int]
    methods: tuple[str, ...]
    keeps: tuple[float, ...] = (0.5, 0.25, 0.1, 0.05, 0.02)
    positions: tuple[str, ...] = ("contiguous", "original")
    seeds: int = 3
    seed: int = 0
    batch: int = 64
    split: str = "test"

    def __post_init__(self) -> None:
        """Check worlds and methods.

        Raises:
            ConfigError: for an unknown world, or no `random` to compare with.
            UnknownMethodError: for an unknown method.
        """
        unknown = set(self.questions) - set(WORLDS)
        if unknown or not self.questions:
            raise ConfigError(f"worlds {sorted(unknown)}: give one or both of {', '.join(WORLDS)}.")
        if RANDOM not in self.methods:
            raise ConfigError(f"Every method is compared with {RANDOM!r}; name it as well.")
        Asking.of(self.methods, self.keeps, seeds=self.seeds)

    def parts(self, speed: SpeedPlan | None) -> int:
        """How many parts `compare` measures."""
        asked = len(self.questions) * (1 + len(self.methods))
        return asked + len(token_parts(self, Path())) + len(speed_parts(self, speed))

    def common(self) -> dict[str, Any]:
        """What every part depends on, but for its world and method."""
        return {
            "keeps": list(self.keeps),
            "positions": list(self.positions),
            "seeds": self.seeds,
            "seed": self.seed,
            "batch": self.batch,
            "split": self.split,
        }


def compare(
    plan: Plan,
    folder: str | Path,
    *,
    speed: SpeedPlan | None = None,
    weights: str | Path = WEIGHTS_DIR,
    processes: int = 2,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every method; what was stopped goes on.

    Args:
        plan: what to ask.
        folder: each finished part is kept there, and used again if it belongs to the same weights,
            plan, versions and source file of the method.
        speed: how to time the methods afterwards, in this process; None leaves it out.
        weights: folder of a model that knows the scenes.
        processes: one-thread processes for the questions.
        progress: called with the name of each part that is there.

    Returns:
        JSON-ready, estimates as [mean, low, high] in shares: `weights` (SHA-256), `plan`,
        `versions`, `machine`, `methods` {name: {stage, control}}, `worlds` {world: {questions,
        images, full, blind, accuracy {mode: {keep: {method: estimate}}}, and likewise `over_random`
        and `over_full`, differences paired by question}}, `tokens` {method: {keep: visual tokens
        of an image that the language model is given}}, `refused` (configurations that the
        library refuses, and why) and `speed` (None, or see `SpeedPlan`).

    Raises:
        ConfigError: for weights that are not there.
    """
    file = Path(weights) / "model.safetensors"
    if not file.exists():
        raise ConfigError(f"{file} is not there: name a folder with trained weights.")
    asked = question_parts(plan, Path(weights))
    answers = measured(asked, folder, processes=processes, progress=progress)
    left = measured(
        token_parts(plan, Path(weights)), folder, processes=processes, progress=progress
    )
    timed = measured(speed_parts(plan, speed), folder, progress=progress)
    found = {world: _world(plan, world, answers) for world in plan.questions}
    return {
        "weights": digest(file),
        "plan": {"questions": plan.questions, **plan.common()},
        "versions": versions(),
        "machine": answers[_name(next(iter(plan.questions)), FULL)]["machine"],
        "methods": {name: describe(name) for name in plan.methods},
        "worlds": {world: one.summary() for world, one in found.items()},
        "tokens": {m: left[_name("tokens", m)] for m in plan.methods if m not in ORACLES},
        "refused": [line for one in found.values() for line in one.refused()],
        "speed": None if speed is None else _speed(plan, speed, timed),
    }


def question_parts(plan: Plan, weights: Path) -> list[Part]:
    """One part per world and method, and one per world for the model without a method."""
    shared = {
        **plan.common(),
        "weights": digest(weights / "model.safetensors"),
        "versions": versions(),
    }
    return [
        Part(
            _name(world, method),
            {**shared, "questions": n, "method": method, "source": source(method)},
            ask_method,
            (world, method, plan, weights),
        )
        for method in (FULL, *plan.methods)
        for world, n in plan.questions.items()
    ]


def token_parts(plan: Plan, weights: Path) -> list[Part]:
    """One part per method; what the oracles keep is what was asked for."""
    shared = {"keeps": list(plan.keeps), "split": plan.split, "versions": versions()}
    return [
        Part(
            _name("tokens", method),
            {**shared, "source": source(method)},
            count_tokens,
            (method, plan, weights),
        )
        for method in plan.methods
        if method not in ORACLES
    ]


def speed_parts(plan: Plan, speed: SpeedPlan | None) -> list[Part]:
    """One part per method; the oracles know a drawing, so they have no speed."""
    if speed is None:
        return []
    return [
        Part(
            _name("speed", method),
            {**speed.identity(), "versions": versions(), "source": source(method)},
            time_method,
            (method, speed),
        )
        for method in plan.methods
        if method not in ORACLES
    ]


def ask_method(world: str, method: str, plan: Plan, weights: Path) -> dict[str, Any]:
    """Ask all questions of a world under one method, or under none (`full`).

    Returns:
        `right` {mode: {keep: [a string of 0 and 1 per run]}} and `refused` {mode: {keep: why}};
        without a method `full` and `blind` as such strings, `kinds` and `scenes` per question, and
        `machine`.
    """
    import torch

    torch.set_num_threads(1)
    model, processor, samples, clip = subject(world, plan.questions[world], plan.split, weights)
    alone = method == FULL
    answers = asking.ask(
        model,
        processor,
        samples,
        Asking.of(
            () if alone else (method,),
            plan.keeps,
            positions=plan.positions,
            seeds=plan.seeds,
            controls=alone,
            tolerant=True,
        ),
        batch_size=plan.batch,
        seed=plan.seed,
        new_tokens=NEW_TOKENS,
        clip=clip,
    )
    if alone:
        return {
            "full": _bits(answers.right[FULL_CELL])[0],
            "blind": _bits(answers.right[BLIND_CELL])[0],
            "kinds": [sample.kind for sample in samples],
            "scenes": [sample.scene_id for sample in samples],
            "machine": machine.environment(),
        }
    return {
        "right": _nested({cell: _bits(rows) for cell, rows in answers.right.items()}),
        "refused": _nested(answers.refused),
    }


def count_tokens(method: str, plan: Plan, weights: Path) -> dict[str, float]:
    """{keep: visual tokens of one image that the language model is given under a method}."""
    world = next(iter(plan.questions))
    model, processor, samples, clip = subject(world, plan.questions[world], plan.split, weights)
    return {
        str(keep): asking.tokens_left(model, processor, method, keep, samples[:1], clip)
        for keep in plan.keeps
    }


@lru_cache(maxsize=2)
def subject(world: str, n: int, split: str, weights: Path) -> tuple[Any, Any, list[Any], Any]:
    """Model, processor, questions and text head: the same for all parts of a process."""
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from vlmcompress.reference.data import samples
    from vlmcompress.reference.exporting import TEXT_HEAD
    from vlmcompress.reference.text_head import TextHead

    model = LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(weights)
    head = TextHead.load(weights / TEXT_HEAD) if (weights / TEXT_HEAD).exists() else None
    return model, processor, list(samples(split, n, world=world)), head


def _world(plan: Plan, world: str, answers: dict[str, Any]) -> World:
    rows = {method: answers[_name(world, method)] for method in plan.methods}
    bare = answers[_name(world, FULL)]
    return World(world, bare, rows, plan.positions, plan.keeps, RANDOM, plan.seed)


def describe(method: str) -> dict[str, Any]:
    """Stage of a method, and whether it is a control."""
    if method in ORACLES:
        return {"stage": "connector", "control": True}
    stages = pipeline.build(method, keep=1).templates
    return {"stage": " | ".join(m.stage for m in stages), "control": method in CONTROLS}


def _speed(plan: Plan, speed: SpeedPlan, timed: dict[str, Any]) -> dict[str, Any]:
    rows = {m: timed[_name("speed", m)] for m in plan.methods if m not in ORACLES}
    where = next(iter(rows.values()))["machine"]
    rows = {m: {k: v for k, v in row.items() if k != "machine"} for m, row in rows.items()}
    return {**speed.identity(), "how": HOW, "machine": where, "methods": rows}


def _name(*words: str) -> str:
    """Of a part, as a file is named."""
    return "-".join(re.sub(r"\W+", "_", word).strip("_") for word in words)


def _bits(rows: np.ndarray) -> list[str]:
    return ["".join("01"[int(right)] for right in row) for row in rows]


def _nested(cells: dict[Cell, Any]) -> dict[str, dict[str, Any]]:
    """{mode: {keep: value}} of one method's cells."""
    found: dict[str, dict[str, Any]] = {}
    for cell, value in cells.items():
        found.setdefault(cell.positions, {})[str(cell.keep)] = value
    return found
