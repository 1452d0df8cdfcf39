"""What an adapter brought: the same questions before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval_harness import machine, statistics
from eval_harness.asking import BLIND_CELL, FULL_CELL, Asking, Cell, Entry, ask
from vlmcompress.core.config import CompressionConfig, StageConfig
from vlmcompress.training.plan import LoraPlan

_NAME = "method"


def keeps_of(plan: LoraPlan) -> tuple[float | int | None, ...]:
    """Budgets to measure at: the plan's, or both ends of a drawn one and half way."""
    if plan.keep is None:
        return (None,)
    return tuple(dict.fromkeys((plan.keep.low, plan.keep.middle, plan.keep.high)))


def before_and_after(
    model: Any,
    processor: Any,
    samples: Sequence[Any],
    plan: LoraPlan,
    folder: Path,
    keeps: Sequence[float | int | None],
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Ask every question without the adapter and with it, compressed and not.

    Args:
        model: a PEFT model, unpatched.
        processor: with a chat template.
        samples: questions.
        plan: of the training.
        folder: that `recipe.save` wrote, with what methods have learnt.
        keeps: budgets; None for a method's own.
        batch_size: questions at a time.
        seed: of random methods and of the bootstrap.
        progress: called with a line of text after each batch.

    Returns:
        JSON-ready: `questions`, `images`, `full` and `blind` of the model alone, `full_adapted`,
        and `at` {keep: `before`, `after`, `gain` (paired), `over_full` (with the adapter and
        compressed, minus the model alone with all tokens), `recovered` (the ratio of these two)};
        each `{mean, low, high}` but for the ratio.
    """
    inner = model.get_base_model()

    def asked(method: str, learns: bool) -> dict[Cell, np.ndarray]:
        entries = {_NAME: Entry.of(method)}
        return ask(
            inner,
            processor,
            samples,
            Asking(entries, tuple(keeps), (plan.positions,)),
            batch_size=batch_size,
            seed=seed,
            reuse_tower=not learns,
            progress=progress,
        ).right

    config = CompressionConfig.load(folder)
    trained = _spec(plan, config, folder)
    plain = trained if plan.method is None else plan.method
    learns = any("weights" in stage.options for stage in config.stages)
    with model.disable_adapter():
        before = asked(plain, learns)
    after = asked(trained, learns)
    rows = {
        "full": before[FULL_CELL].mean(0),
        "blind": before[BLIND_CELL].mean(0),
        "full_adapted": after[FULL_CELL].mean(0),
    }
    for keep in keeps:
        cell = Cell(plan.positions, _NAME, keep)
        old, new = (found.get(cell, found[FULL_CELL]).mean(0) for found in (before, after))
        rows |= {
            f"{keep}/before": old,
            f"{keep}/after": new,
            f"{keep}/gain": new - old,
            f"{keep}/over_full": new - rows["full"],
        }
    kinds = np.array([sample.kind for sample in samples])
    images = np.array([sample.scene_id for sample in samples])
    found = statistics.means_over_kinds(list(rows.values()), kinds, images, seed=seed)
    told = {name: one.to_dict() for name, one in zip(rows, found, strict=True)}
    at: dict[str, dict[str, Any]] = {str(keep): {} for keep in keeps}
    for name in [name for name in told if "/" in name]:
        budget, _, what = name.partition("/")
        at[budget][what] = told.pop(name)
    for row in at.values():
        row["recovered"] = row["after"]["mean"] / told["full"]["mean"]
    return {
        "questions": len(samples),
        "images": len(np.unique(images)),
        **told,
        "at": at,
        "seed": seed,
        "machine": machine.describe(inner),
    }


def _spec(plan: LoraPlan, config: CompressionConfig, folder: Path) -> str:
    """The plan's method with what it has learnt, its budget as open as there."""
    given: Sequence[StageConfig] = [StageConfig(config.stages[0].method)]
    if plan.method is not None:
        given = CompressionConfig.from_spec(plan.method).stages
    stages = []
    for stage, written in zip(given, config.stages, strict=True):
        options = dict(stage.options)
        if "weights" in written.options:
            options["weights"] = str(folder / written.options["weights"])
        stages.append(dataclasses.replace(stage, options=options))
    return CompressionConfig(tuple(stages)).to_spec()
