"""Accuracy of a compressed model on questions about images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from eval_harness import machine, statistics
from eval_harness.asking import BLIND_CELL, FULL_CELL, Asking, Cell, Sample, ask
from vlmcompress.methods.base import Method


def evaluate(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    *,
    methods: Sequence[str | Method],
    keeps: Sequence[float | int],
    positions: str = "auto",
    batch_size: int = 64,
    seed: int = 0,
    seeds: int = 1,
    new_tokens: int = 4,
    reuse_tower: bool = True,
    clip: Any = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Ask every question under every method and budget.

    The greedy answer must equal the expected one (case and surrounding space aside). Accuracies are
    unweighted means over the kinds of questions, their intervals bootstraps over images.

    Args:
        model: an unpatched VLM; unpatched again afterwards.
        processor: with a chat template.
        samples: questions; those of one image (`scene_id`) should follow each other.
        methods: registered names, spec strings, configured methods, or the controls `oracle`
            (patches that objects cover), `oracle_asked` (the asked objects) and `anti_oracle`. The
            control `blind` (no image) and the full model are always run.
        keeps: fractions or counts. At 1.0 a training-free method is the full model, which runs
            once.
        positions: as `patch` takes it.
        batch_size: questions at a time.
        seed: of random methods (another number for each batch) and of the bootstrap.
        seeds: how often to run the methods that depend on a seed; a question then counts with the
            share of runs that answered it rightly.
        new_tokens: longest answer.
        reuse_tower: run the tower once per image instead of once per question and configuration.
        clip: as `patch` takes it, for methods that read the question.
        progress: called with a line of text after each batch.

    Returns:
        JSON-ready: `n`, `images`, `accuracy` {keep: {method: {mean, low, high}}}, `difference` (the
        same for method minus full model, paired), `by_kind` (full model) and `by_kind_interval`,
        `by_kind_at` {keep: {method: {kind: float}}}, `by_seed` {keep: {method: [float, ...]}} of
        the methods that depend on a seed, `full` {mean, low, high}, `blind`,
        `blind_by_kind` and `blind_interval`, `seed`, `positions`, `commit`, `machine`.

    Raises:
        ConfigError: without samples, for an unknown method or two methods of one name, or for
            `seeds` below 1.
    """
    asked = list(samples)
    plan = Asking.of(methods, keeps, positions=(positions,), seeds=seeds)
    where = machine.describe(model)
    answers = ask(
        model,
        processor,
        asked,
        plan,
        batch_size=batch_size,
        seed=seed,
        new_tokens=new_tokens,
        reuse_tower=reuse_tower,
        clip=clip,
        progress=progress,
    )
    return {
        **_results(asked, plan, answers.right, seed),
        "seed": seed,
        "positions": positions,
        "commit": where["commit"],
        "machine": where,
    }


def _results(
    samples: Sequence[Sample],
    plan: Asking,
    right: dict[Cell, np.ndarray],
    seed: int,
) -> dict[str, Any]:
    kinds = np.array([s.kind for s in samples])
    images = np.array([s.scene_id for s in samples])
    full, blind = right[FULL_CELL][0].astype(float), right[BLIND_CELL][0].astype(float)

    def runs(name: str, keep: float | int | None) -> np.ndarray:
        """[runs, questions]."""
        cell = Cell(plan.positions[0], name, keep)
        return full[None] if plan.is_full(name, keep) else right[cell].astype(float)

    def table(cell: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        return {
            str(keep): {name: cell(runs(name, keep).mean(axis=0)) for name in plan.entries}
            for keep in plan.keeps
        }

    def estimate(row: np.ndarray) -> dict[str, float]:
        return statistics.mean_over_kinds(row, kinds, images, seed=seed).to_dict()

    return {
        "n": len(samples),
        "images": len(np.unique(images)),
        "accuracy": table(estimate),
        "difference": table(lambda row: estimate(row - full)),
        "by_kind": _by_kind(full, kinds),
        "by_kind_interval": {
            str(kind): statistics.proportion(int(rows.sum()), len(rows)).to_dict()
            for kind in np.unique(kinds)
            for rows in [full[kinds == kind]]
        },
        "by_kind_at": table(lambda row: _by_kind(row, kinds)),
        "by_seed": {
            str(keep): {
                name: [_mean(row, kinds) for row in runs(name, keep)]
                for name in plan.entries
                if len(runs(name, keep)) > 1
            }
            for keep in plan.keeps
        },
        "full": estimate(full),
        "blind": estimate(blind)["mean"],
        "blind_by_kind": _by_kind(blind, kinds),
        "blind_interval": estimate(blind),
    }


def _mean(values: np.ndarray, kinds: np.ndarray) -> float:
    return float(np.mean(list(_by_kind(values, kinds).values())))


def _by_kind(values: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    return {str(kind): float(values[kinds == kind].mean()) for kind in np.unique(kinds)}
