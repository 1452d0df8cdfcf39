"""The folder of a trained adapter: what loads it again, and how it was made."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import yaml_dump
from safetensors import safe_open
from safetensors.torch import save_file

from eval_harness.machine import environment
from vlmcompress import hub
from vlmcompress.core.errors import CheckpointError, ConfigError
from vlmcompress.core.extras import require
from vlmcompress.hub.folder import RECIPE, RESULTS
from vlmcompress.training.plan import LoraPlan

if TYPE_CHECKING:
    from vlmcompress.live.handle import Handle

_RUN = "run.json"
#: The worlds of drawn scenes, for readers.
_ASKED = {"objects": "drawn objects, test split", "text": "drawn texts, test split"}
_PACKAGES = ("vlmcompress", "accelerate", "peft")


def begin(folder: Path, checkpoints: Path, plan: LoraPlan, processes: int) -> None:
    """Note what a run is, or see that the one in its folder is the same.

    Args:
        folder: of the adapter.
        checkpoints: of the run.
        plan: of the run.
        processes: that train together.

    Raises:
        ConfigError: when a finished adapter lies there, or a run with other options.
        CheckpointError: when what was noted cannot be read.
    """
    run = checkpoints / _RUN
    wanted = json.loads(json.dumps({**plan.to_dict(), "processes": processes}))
    if run.is_file():
        _check(run, wanted)
    elif (folder / RECIPE).is_file():
        raise ConfigError(
            f"{folder} holds a finished adapter; train in another folder, or anew with "
            "resume=False."
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    run.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def forget(folder: Path, checkpoints: Path) -> None:
    """Take away a run, and that its adapter is finished."""
    shutil.rmtree(checkpoints, ignore_errors=True)
    (folder / RECIPE).unlink(missing_ok=True)


def _check(run: Path, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(run.read_text(encoding="utf-8"))
        other = [f"{name}={found.get(name)!r}" for name in wanted if found[name] != wanted[name]]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{run} does not say what the run was ({error!r}); start anew with resume=False."
        ) from error
    if other:
        raise ConfigError(
            f"{run.parent} was trained with {', '.join(other)}: resume with the same, train in "
            "another folder, or start anew with resume=False."
        )


def save(
    handle: Handle,
    folder: Path,
    plan: LoraPlan,
    curve: Sequence[Mapping[str, float]],
    facts: Mapping[str, Any],
) -> None:
    """Write the adapter that a handle carries, and its recipe.

    A drawn budget is stored as the one half way, with the range beside it.

    Args:
        handle: of the trained model.
        folder: of the adapter.
        plan: of the training.
        curve: rows of its log.
        facts: about it besides, JSON-ready: `command`, `model`, `data`.
    """
    trained_keep = None if plan.keep is None else plan.keep.to_list()
    if plan.keep is not None and not plan.keep.fixed:
        handle.set(keep=plan.keep.middle)
    hub.save(handle, folder, trained_keep=trained_keep)
    _store(folder, getattr(torch, plan.stored))
    write(folder, plan.to_dict(), curve, facts, trained_keep)


def write(
    folder: Path,
    plan: Mapping[str, Any],
    curve: Sequence[Mapping[str, float]],
    facts: Mapping[str, Any],
    trained_keep: Sequence[float] | None = None,
) -> None:
    """Write how an adapter was made, last of all: a folder without it is not finished.

    Args:
        folder: of the adapter.
        plan: of the training, JSON-ready.
        curve: rows of its log.
        facts: as for `save`.
        trained_keep: budgets of the training.
    """
    told = {
        **facts,
        "plan": plan,
        "trained_keep": trained_keep,
        "versions": _versions(),
        "machine": environment(),
        "end": curve[-1] if curve else None,
    }
    (folder / RECIPE).write_text(yaml_dump(json.loads(json.dumps(told))), encoding="utf-8")


def _versions() -> dict[str, str]:
    """Of the packages that are there: thresholds are trained without peft."""
    found = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _store(folder: Path, dtype: torch.dtype) -> None:
    """Write the floats of an adapter's files in another dtype."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, value in tensors.items():
            tensors[name] = value.to(dtype) if value.is_floating_point() else value
        save_file(tensors, path, header)


def recipe_of(folder: Path) -> dict[str, Any]:
    """What `save` wrote into a folder; nothing where there is no recipe.

    Raises:
        ConfigError: when it cannot be read.
    """
    path = folder / RECIPE
    if not path.is_file():
        return {}
    yaml = require("yaml")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); train the adapter again.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no recipe but {type(found).__name__}; train again.")
    return found


def write_results(folder: Path, found: Mapping[str, Any], about: hub.About) -> dict[str, Any]:
    """Write what was measured, and the card, whose numbers come from nothing else.

    Args:
        folder: of the adapter.
        found: what the file is to hold, with the `command` that made it.
        about: what the card says beside the folder's files.

    Returns:
        What the file holds.
    """
    (folder / RESULTS).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    hub.write_card(folder, about)
    return dict(found)


def told(
    measured: Mapping[str, Any] | None, rows: Callable[[Any], list[dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """What a results file says of a measurement; nothing where there was none.

    Args:
        measured: what `before_and_after` returned, or another measurement.
        rows: makes evaluations of it; those of `before_and_after` if not given.
    """
    if measured is None:
        return {}
    made = (rows or evaluations)(measured)
    return {"machine": measured["machine"], "measured": measured, "evaluations": made}


def about_reference(folder: Path, facts: Mapping[str, Any]) -> hub.About:
    """What a card says of a training; the licence of the reference model is this library's."""
    license = "apache-2.0" if facts.get("model") == "reference" else None
    return hub.About(folder.resolve().name, license=license)


def evaluations(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a card of what `before_and_after` returned."""
    rows: list[dict[str, Any]] = []
    for world, found in measured["worlds"].items():
        values = []
        for keep, at in found["at"].items():
            named = "compressed" if keep == "None" else f"keep {keep}"
            values.append((f"{named}, with the adapter", at["after"], False))
            values.append((f"{named}, without", at["before"], True))
        values.append(("all tokens, with the adapter", found["full_adapted"], False))
        values.append(("all tokens, without", found["full"], True))
        values.append(("no image, without", found["blind"], True))
        rows += [
            evaluation(world, setting, "accuracy", value, found["questions"], compared)
            for setting, value, compared in values
        ]
    return rows


def evaluation(
    world: str,
    setting: str,
    metric: str,
    value: Mapping[str, float] | float,
    questions: int,
    compared: bool = True,
) -> dict[str, Any]:
    """One row of a card about drawn scenes, see `vlmcompress.hub.results`.

    Args:
        world: of the scenes.
        setting: what answered.
        metric: its name.
        value: `mean`, `low` and `high`, or a number without an interval.
        questions: how many were asked.
        compared: whether it is shown beside, and of something else.
    """
    range_ = {"mean": value} if isinstance(value, float | int) else value
    return {
        "dataset": {"name": _ASKED[world]},
        "setting": setting,
        "metric": metric,
        "value": range_["mean"],
        "low": range_.get("low"),
        "high": range_.get("high"),
        "questions": questions,
        "compared": compared,
    }
