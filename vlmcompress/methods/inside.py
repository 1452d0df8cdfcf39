"""Names of methods where there is nothing but a tower.

Merging is published once for the inside of a vision transformer and applied after it elsewhere, so
that `tome` and `pitome` name what is done between tower and language model, `tome_tower` and
`pitome_tower` the same rule inside. Without a language model only the second can be meant.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vlmcompress.core.config import CompressionConfig, StageConfig
from vlmcompress.methods import registry
from vlmcompress.methods.tower.base import TowerReducer


def inside_tower(method: Any) -> Any:
    """What `patch` accepts as `method`, with such names read as those inside the tower.

    A configured method is left as it is.
    """
    if isinstance(method, str):
        return [_inside(stage) for stage in CompressionConfig.from_spec(method).stages]
    if isinstance(method, StageConfig):
        return _inside(method)
    if isinstance(method, CompressionConfig):
        return dataclasses.replace(method, stages=tuple(map(_inside, method.stages)))
    if isinstance(method, list | tuple):
        parts = (inside_tower(part) for part in method)
        return [stage for part in parts for stage in (part if isinstance(part, list) else [part])]
    return method


def names_inside(*, cls: bool) -> list[str]:
    """Methods that shorten a tower by a `keep`, as they are, without training.

    Args:
        cls: whether it has a [CLS] token.
    """
    found = {name: registry.get(name) for name in registry.names()}
    return [
        name
        for name, kind in found.items()
        if issubclass(kind, TowerReducer)
        and kind.training_free
        and not kind().own_budget
        and (cls or not kind.needs_cls)
    ]


def _inside(stage: StageConfig) -> StageConfig:
    twin = f"{stage.method}_tower"
    return dataclasses.replace(stage, method=twin) if twin in registry.names() else stage
