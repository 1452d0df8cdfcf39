"""What an adapter brings: the same questions without it and with it, as it lies in its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval_harness import machine, statistics
from eval_harness.asking import BLIND_CELL, FULL_CELL, Asking, Cell, Entry, ask
from eval_harness.comparison import NEW_TOKENS
from vlmcompress import hub
from vlmcompress.core.config import CompressionConfig, StageConfig
from vlmcompress.hub.folder import Adapter, read
from vlmcompress.training.keeps import KeepRange
from vlmcompress.training.recipe import recipe_of

Keeps = Sequence[float | int | None]
_NAME = "method"


@dataclass(frozen=True)
class Measurable:
    """An adapter's methods as spec strings, their budget as open as in its training.

    Attributes:
        trained: with what they have learnt.
        plain: the same, untrained.
        learns: whether there is a difference between the two.
        lora: whether LoRA goes with them.
        positions: as `patch` takes them.
        trained_keep: lowest and highest budget of the training, if there is one.
    """

    trained: str
    plain: str
    learns: bool
    lora: bool
    positions: str
    trained_keep: tuple[float | int, float | int] | None

    @classmethod
    def of(cls, folder: str | Path) -> Measurable:
        """Of an adapter in a folder.

        Raises:
            ConfigError, CheckpointError: for what is no adapter.
        """
        found = read(folder)
        stages = _open(found)
        bare = tuple(dataclasses.replace(s, options=_untrained(s)) for s in stages)
        return cls(
            CompressionConfig(stages).to_spec(),
            CompressionConfig(bare).to_spec(),
            stages != bare,
            found.lora,
            found.config.positions,
            found.config.trained_keep,
        )

    @property
    def keeps(self) -> tuple[float | int | None, ...]:
        """Budgets to measure at: the training's, or both ends of a drawn one and half way."""
        if self.trained_keep is None:
            return (None,)
        drawn = KeepRange(*self.trained_keep)
        return tuple(dict.fromkeys((drawn.low, drawn.middle, drawn.high)))


def _open(found: Adapter) -> tuple[StageConfig, ...]:
    """Stages with their weights; the budget that a training drew or fixed is taken out again."""
    stages = found.located.stages
    if found.config.trained_keep is None:
        return stages
    method = (recipe_of(found.folder).get("plan") or {}).get("method")
    if method is None:
        return (*stages[:-1], dataclasses.replace(stages[-1], keep=None))
    given = CompressionConfig.from_spec(method).stages
    return tuple(dataclasses.replace(s, keep=g.keep) for s, g in zip(stages, given, strict=True))


def _untrained(stage: StageConfig) -> dict[str, Any]:
    return {name: value for name, value in stage.options.items() if name != "weights"}


def before_and_after(
    model: Any,
    processor: Any,
    folder: str | Path,
    samples: Mapping[str, Sequence[Any]],
    keeps: Keeps | None = None,
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Ask every question without an adapter and with it, compressed and not.

    Args:
        model: that the adapter is for, unpatched and without it; so it is afterwards.
        processor: with a chat template.
        folder: of the adapter.
        samples: {world: questions}.
        keeps: budgets, None for a method's own; those of the training if not given.
        batch_size: questions at a time.
        seed: of random methods and of the bootstrap.
        progress: called with a line of text after each batch.

    Returns:
        JSON-ready: `worlds`, `seed` and `machine`. For each world `questions`, `images`, `full` and
        `blind` of the model alone, `full_adapted`, and `at` {keep: `before`, `after`, `gain`
        (paired), `over_full` (with the adapter and compressed, minus the model alone with all
        tokens), `recovered` (the ratio of these two)}; each `{mean, low, high}` but for the ratio.

    Raises:
        ConfigError, CheckpointError: for what is no adapter, or one of another model.
    """
    adapter = Measurable.of(folder)
    keeps = adapter.keeps if keeps is None else keeps

    def asked(method: str) -> dict[str, dict[Cell, np.ndarray]]:
        plan = Asking({_NAME: Entry.of(method)}, tuple(keeps), (adapter.positions,))
        return {
            world: ask(
                model,
                processor,
                some,
                plan,
                batch_size=batch_size,
                seed=seed,
                new_tokens=NEW_TOKENS,
                reuse_tower=not adapter.learns,
                progress=progress,
            ).right
            for world, some in samples.items()
        }

    before = asked(adapter.plain)
    hub.load(model, folder, processor=processor).remove()  # what it has trained stays
    try:
        after = asked(adapter.trained)
    finally:
        hub.unload(model)
    cells = {keep: Cell(adapter.positions, _NAME, keep) for keep in keeps}
    return {
        "worlds": {
            world: _estimates(some, before[world], after[world], cells, seed)
            for world, some in samples.items()
        },
        "seed": seed,
        "machine": machine.describe(model),
    }


def _estimates(
    samples: Sequence[Any],
    before: Mapping[Cell, np.ndarray],
    after: Mapping[Cell, np.ndarray],
    cells: Mapping[float | int | None, Cell],
    seed: int,
) -> dict[str, Any]:
    """What `before_and_after` tells of one world."""
    rows = {
        "full": before[FULL_CELL].mean(0),
        "blind": before[BLIND_CELL].mean(0),
        "full_adapted": after[FULL_CELL].mean(0),
    }
    for keep, cell in cells.items():
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
    at: dict[str, dict[str, Any]] = {str(keep): {} for keep in cells}
    for name in [name for name in told if "/" in name]:
        budget, _, what = name.partition("/")
        at[budget][what] = told.pop(name)
    for row in at.values():
        row["recovered"] = row["after"]["mean"] / told["full"]["mean"]
    return {"questions": len(samples), "images": len(np.unique(images)), **told, "at": at}
