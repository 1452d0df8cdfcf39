"""The folder that a training of ATP's thresholds leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmcompress import hub
from vlmcompress.live.patch import patch
from vlmcompress.training import recipe
from vlmcompress.training.atp import Plan, Trained

_WORLD = "objects"
_DIFFERENCE = "accuracy, paired difference"


def save(model: Any, trained: Trained, folder: str | Path) -> Path:
    """Write what was learnt and the configuration that loads it.

    Args:
        model: that was trained on, unpatched, with LoRA in it where that was trained.
        trained: thresholds.
        folder: of the adapter, made if it is missing.

    Returns:
        The folder.
    """
    with patch(model, trained.method) as handle:
        assert handle.parts is not None  # the method has some
        handle.parts.load_state_dict(trained.parts.state_dict())
        return hub.save(handle, folder)


def write(
    folder: Path,
    plan: Plan,
    trained: Trained,
    facts: Mapping[str, Any],
    measured: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write recipe, results and card.

    Args:
        folder: that `save` wrote.
        plan: of the training.
        trained: thresholds.
        facts: as for `recipe.save`.
        measured: what `against_schedules` returned, if it was asked.

    Returns:
        What the results file holds.
    """
    found = {**facts, "plan": plan.to_dict(), "curve": trained.curve}
    about = recipe.about_reference(folder, facts)
    results = recipe.write_results(folder, {**found, **recipe.told(measured, evaluations)}, about)
    recipe.write(folder, plan.to_dict(), trained.curve, facts)
    return results


def evaluations(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a card: thresholds and fixed schedules that keep as much on average.

    Args:
        found: what `against_schedules` returned.
    """
    (own, *fixed) = found["accuracy"]

    def row(setting: str, metric: str, value: Any, compared: bool = True) -> dict[str, Any]:
        return recipe.evaluation(_WORLD, setting, metric, value, found["questions"], compared)

    rows = [row(own, "accuracy", found["accuracy"][own], compared=False)]
    for name in fixed:
        rows.append(row(f"{name}, as much on average", "accuracy", found["accuracy"][name]))
        rows.append(row(f"{own} minus {name}", _DIFFERENCE, found["difference"][name]))
    rows.append(row("all tokens", "accuracy", found["full"]))
    rows.append(row(f"{own} minus all tokens", _DIFFERENCE, found["over_full"]))
    rows.append(row("no image", "accuracy", found["blind"]))
    for name, share in found["flops"].items():
        rows.append(row(name, "FLOPs of the prefill, share of all tokens'", share))
    kept = "visual tokens, mean over layers, share"
    low, high = found["spread"]
    rows.append(row(own, f"{kept}, mean over questions", found["average_keep"]))
    rows.append(row(own, f"{kept}, 5th percentile over questions", low))
    rows.append(row(own, f"{kept}, 95th percentile over questions", high))
    behind = f"visual tokens behind the last site, of {found['tokens']}"
    return [*rows, row(own, behind, found["left"][-1])]
