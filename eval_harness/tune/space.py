"""The pipelines that are searched: by default what a model can run, or what a file says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_harness.sweep.naming import unknown
from vlmcompress.core.config import CompressionConfig
from vlmcompress.core.errors import ConfigError, UnknownMethodError, VLMCompressError
from vlmcompress.core.extras import require
from vlmcompress.core.keep import parse_keep
from vlmcompress.methods import pipeline

if TYPE_CHECKING:
    from vlmcompress.doctor import Diagnosis

STAGES = ("tower", "connector", "decoder")
_FIELDS = (*STAGES, "keeps", "pipelines")

#: The default space. Connectors alone at every keep; the first two with what is around them.
CONNECTORS = ("vtc_cls", "divprune", "visionzip", "pool")
KEEPS = (0.75, 0.5, 0.33, 0.25, 0.15, 0.1, 0.05)
TOWERS = ("tome_tower:0.5", "evit:0.5")
DECODERS = ("fastv:0.5", "pyramiddrop:0.25")
COMBINED_KEEPS = (0.5, 0.25, 0.1)
_COMBINED = 2


def default(diagnosis: Diagnosis) -> tuple[str, ...]:
    """The pipelines of a model whose methods `vlmcompress doctor` says can run.

    The model's default method comes first; methods that read the question or must be trained
    are left to files.

    Args:
        diagnosis: of the model.

    Raises:
        ConfigError: when none can run.
    """
    runs = {verdict.name for verdict in diagnosis.methods if verdict.runs}
    names = dict.fromkeys((diagnosis.default_method, *CONNECTORS))
    connectors = [name for name in names if name in runs]
    around = [[""], [""]]
    for place, specs in enumerate((TOWERS, DECODERS)):
        around[place] += [spec for spec in specs if _name(spec) in runs]
    grids = [
        {"connector": connectors, "keeps": KEEPS},
        {
            "tower": around[0],
            "connector": connectors[:_COMBINED],
            "decoder": around[1],
            "keeps": COMBINED_KEEPS,
        },
    ]
    if not connectors:
        raise ConfigError(
            f"None of {', '.join(names)} runs on this {diagnosis.model_type} model; name pipelines "
            "of your own in a file."
        )
    return of(grids)


def read(path: str | Path) -> tuple[str, ...]:
    """The pipelines of a YAML file: a mapping, or a list of them (docs/tuning.md).

    Raises:
        ConfigError: for a file that cannot be read, unknown fields (with near names), pipelines
            that cannot be built, or none at all.
        UnknownMethodError: for an unknown method.
    """
    yaml = require("yaml")
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    return of(found if isinstance(found, list) else [found])


def of(grids: Sequence[Any]) -> tuple[str, ...]:
    """Every pipeline of some grids, each once.

    Args:
        grids: mappings with `tower`, `connector` and `decoder` (specs; null for none), `keeps` for
            connectors that do not say how much stays, and `pipelines` (whole specs).

    Raises:
        ConfigError: as `read`.
        UnknownMethodError: as `read`.
    """
    specs = dict.fromkeys(_checked(spec) for grid in grids for spec in _expanded(grid))
    if not specs:
        raise ConfigError("The space holds no pipeline; name some under 'connector'.")
    return tuple(specs)


def _expanded(grid: Any) -> Iterable[str]:
    if not isinstance(grid, Mapping):
        raise ConfigError(f"A space is {grid!r}; it must be a mapping of {', '.join(_FIELDS)}.")
    for name in grid:
        if name not in _FIELDS:
            raise ConfigError(unknown("field of a space", str(name), _FIELDS))
    yield from map(str, _list(grid.get("pipelines", [])))
    if not any(grid.get(stage) for stage in STAGES):
        return
    keeps = _list(grid.get("keeps", []))
    stages = [
        _list(grid.get("tower")),
        [spec for one in _list(grid.get("connector")) for spec in _budgeted(one, keeps)],
        _list(grid.get("decoder")),
    ]
    for row in product(*stages):
        if any(row):
            yield " | ".join(str(spec) for spec in row if spec)


def _budgeted(connector: Any, keeps: Sequence[Any]) -> list[str]:
    """A connector stage at every keep, or as it is where it says how much stays."""
    if not connector:
        return [""]
    spec = str(connector)
    try:
        pipeline.build(spec)
    except ConfigError:
        pipeline.build(spec, 1)  # what is wrong with it apart from the budget
        if not keeps:
            raise ConfigError(
                f"Connector {spec!r} does not say how much it keeps; give keeps, or {spec}:0.1."
            ) from None
        return [f"{spec}:{_keep(keep)}" for keep in keeps]
    return [spec]


def _keep(keep: Any) -> Any:
    parse_keep(keep)
    return keep


def _checked(spec: str) -> str:
    try:
        pipeline.build(spec)
    except UnknownMethodError:
        raise
    except VLMCompressError as error:
        raise ConfigError(f"Pipeline {spec!r} of the space: {error}") from error
    return CompressionConfig.from_spec(spec).to_spec()


def _name(spec: str) -> str:
    return CompressionConfig.from_spec(spec).stages[0].method


def _list(value: Any) -> list[Any]:
    if value is None:
        return [""]
    return [*value] if isinstance(value, list | tuple) else [value]
