"""The folder of a trained adapter: what loads it again, and how it was made."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import yaml_dump
from safetensors import safe_open
from safetensors.torch import save_file

from eval_harness.machine import environment
from vlmcompress import hub
from vlmcompress.core.errors import CheckpointError, ConfigError
from vlmcompress.hub.folder import RECIPE, RESULTS
from vlmcompress.training.plan import LoraPlan

if TYPE_CHECKING:
    from vlmcompress.live.handle import Handle

_RUN = "run.json"
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
    told = {
        **facts,
        "plan": plan.to_dict(),
        "trained_keep": trained_keep,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": environment(),
        "end": curve[-1] if curve else None,
    }
    (folder / RECIPE).write_text(yaml_dump(json.loads(json.dumps(told))), encoding="utf-8")


def _store(folder: Path, dtype: torch.dtype) -> None:
    """Write the floats of an adapter's files in another dtype."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, value in tensors.items():
            tensors[name] = value.to(dtype) if value.is_floating_point() else value
        save_file(tensors, path, header)


def results(
    folder: Path,
    plan: LoraPlan,
    curve: Sequence[Mapping[str, float]],
    facts: Mapping[str, Any],
    measured: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write what was measured, and the card, whose numbers come from nothing else.

    Args:
        folder: of the adapter.
        plan: of the training.
        curve: rows of its log.
        facts: as for `save`.
        measured: what `before_and_after` returned, if it was asked.

    Returns:
        What the file holds.
    """
    found: dict[str, Any] = {**facts, "plan": plan.to_dict(), "curve": list(curve)}
    if measured is not None:
        found |= {"measured": measured, "evaluations": _evaluations(measured)}
    text = json.dumps(found, indent=2) + "\n"
    (folder / RESULTS).write_text(text, encoding="utf-8")
    hub.write_card(folder, hub.About(folder.resolve().name, license=_license(facts)))
    return found


def _license(facts: Mapping[str, Any]) -> str | None:
    """Of the reference model, which is this library's; that of others is found by the hub."""
    return "apache-2.0" if facts.get("model") == "reference" else None


def _evaluations(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a card, see `vlmcompress.hub.results`."""

    def row(setting: str, value: Mapping[str, float], compared: bool) -> dict[str, Any]:
        return {
            "dataset": {"name": "drawn scenes, test split"},
            "setting": setting,
            "metric": "accuracy",
            "value": value["mean"],
            "low": value["low"],
            "high": value["high"],
            "questions": measured["questions"],
            "compared": compared,
        }

    rows = []
    for keep, found in measured["at"].items():
        named = "compressed" if keep == "None" else f"keep {keep}"
        rows.append(row(f"{named}, with the adapter", found["after"], False))
        rows.append(row(f"{named}, without", found["before"], True))
    rows.append(row("all tokens, with the adapter", measured["full_adapted"], False))
    rows.append(row("all tokens, without", measured["full"], True))
    return [*rows, row("no image, without", measured["blind"], True)]
