"""What a server is told to compress, by `--hf-overrides` and by the file beside its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmcompress.core.config import CONFIG_NAME, CompressionConfig
from vlmcompress.core.errors import ConfigError, ConfigTypeError

#: The attribute of the model's configuration that `--hf-overrides` sets.
KEY = "vlmcompress"
_ALLOWED = ("config", "method", "keep", "positions", "seed", "untested_engine")
_EXAMPLE = '--hf-overrides \'{"vlmcompress": {"method": "vtc_cls", "keep": 0.1}}\''


@dataclass(frozen=True)
class Settings:
    """What `methods.pipeline.build` is given, and what the engine may be.

    Attributes:
        method: a spec string, a configuration from a file, or None for the tower's default.
        keep: budget; None where the method has one.
        positions: as for `patch`, where no file says it.
        seed: likewise.
        untested_engine: whether engine versions that were never tested are taken too.
    """

    method: str | CompressionConfig | None
    keep: Any = None
    positions: str = "auto"
    seed: int = 0
    untested_engine: bool = False


def read(given: object, model: str) -> Settings | None:
    """What a model is served with; None for a server that compresses nothing.

    Args:
        given: of `--hf-overrides`: None (a `vlmcompress_config.json` in the model's folder decides,
            if there is one), False (nothing is compressed, whatever lies there), a spec string, or
            a mapping with `method` or `config` (a folder, or a repository of the Hub), `keep`,
            `positions`, `seed`, `untested_engine`.
        model: the folder of the model, or its name on the Hub.

    Raises:
        ConfigError, ConfigTypeError: for anything else, and for files that cannot be read.
    """
    beside = Path(model) / CONFIG_NAME
    found = CompressionConfig.load(beside) if given is not False and beside.is_file() else None
    if given is None or given is False:
        return None if found is None else Settings(found)
    if isinstance(given, str):
        return Settings(given)
    if not isinstance(given, Mapping):
        raise ConfigTypeError(
            f"{KEY} is {given!r} ({type(given).__name__}); give a spec string, false or an object, "
            f"as in {_EXAMPLE}."
        )
    return _merged(given, found)


def _merged(given: Mapping[str, Any], found: CompressionConfig | None) -> Settings:
    unknown = sorted(set(given) - set(_ALLOWED))
    if unknown:
        raise ConfigError(
            f"{KEY} has unknown keys {', '.join(unknown)}; allowed are {', '.join(_ALLOWED)}, as "
            f"in {_EXAMPLE}."
        )
    method, place = given.get("method"), given.get("config")
    if method is not None and place is not None:
        raise ConfigError(f"{KEY} names both a method and a config; give one of them.")
    if method is not None and not isinstance(method, str):
        raise ConfigTypeError(f"{KEY}'s method is {method!r}; it must be a name or a spec string.")
    source = _from(place) if place is not None else found
    if method is None and source is not None:
        fixed = sorted({"positions", "seed"} & set(given))
        if fixed:
            raise ConfigError(
                f"{KEY} gives {' and '.join(fixed)}, which {CONFIG_NAME} says; change the file, or "
                "name a method."
            )
        return Settings(source, given.get("keep"), untested_engine=_flag(given))
    return Settings(
        method,
        given.get("keep"),
        given.get("positions", "auto"),
        given.get("seed", 0),
        _flag(given),
    )


def _from(place: object) -> CompressionConfig:
    """The configuration of an adapter's folder, of a repository, or of a file."""
    from vlmcompress.hub.fetching import locate
    from vlmcompress.hub.folder import read as read_folder

    if not isinstance(place, str):
        raise ConfigTypeError(f"{KEY}'s config is {place!r}; it must be a path or a name.")
    if Path(place).is_file():
        return CompressionConfig.load(place)
    return read_folder(locate(place)).located


def _flag(given: Mapping[str, Any]) -> bool:
    value = given.get("untested_engine", False)
    if not isinstance(value, bool):
        raise ConfigTypeError(f"{KEY}'s untested_engine is {value!r}; it must be true or false.")
    return value
