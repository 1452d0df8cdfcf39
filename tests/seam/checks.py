"""Every equality by its name in the matrix, whatever the stage of the method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.seam import equalities, layer_equalities, matrix, use_equalities
from tests.seam.worlds import World

CHECKS: dict[str, Callable[..., None]] = {
    "keep_all": equalities.keep_all,
    "drop_is_mask": equalities.drop_is_mask,
    "cut_by_hand": equalities.cut_by_hand,
    "batch_is_singles": equalities.batch_is_singles,
    "cached_is_uncached": equalities.cached_is_uncached,
    "cache_bytes": equalities.cache_bytes,
    "remove_restores": equalities.remove_restores,
    "same_seed": use_equalities.same_seed,
    "training": use_equalities.training,
    "turns": use_equalities.turns,
}
#: Those that mean something else inside the language model.
LAYER_CHECKS: dict[str, Callable[..., None]] = {
    "drop_is_mask": layer_equalities.drop_is_mask,
    "cut_by_hand": layer_equalities.cut_by_hand,
    "cache_bytes": layer_equalities.cache_bytes,
}


def check(equality: str, w: World, method: str, keeps: Sequence[Any] | None = None) -> None:
    """Hold a method to an equality.

    Args:
        equality: its name.
        w: the model.
        method: the method's name.
        keeps: budgets in place of the matrix's, for equalities that have budgets.
    """
    inside = LAYER_CHECKS if matrix.stage_of(method) == "decoder" else {}
    held = inside.get(equality, CHECKS[equality])
    if keeps is None:
        held(w, method)
    else:
        held(w, method, keeps)
