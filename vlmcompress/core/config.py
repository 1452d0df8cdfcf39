"""`CompressionConfig`: what is applied where, as one serialisable value.

Spec strings name a pipeline in one line: `"vtc_cls:0.25 | fastv@2:0.5"`. A stage is
`name[(option=value, ...)][@site][:keep]`; stages are separated by `|`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.core.keep import AutoKeep, Keep, parse_keep
from vlmcompress.core.trained import TrainedKeep, parse_trained_keep

CONFIG_NAME = "vlmcompress_config.json"
CONFIG_VERSION = 2
"""1 had no `trained_keep`."""

Positions: TypeAlias = Literal["auto", "original", "contiguous"]

_STAGE = re.compile(
    r"""
    \s* (?P<method> [A-Za-z_]\w* )
    \s* (?: \( (?P<options> .*? ) \) (?= \s* (?: [@:] | $ ) ) )?
    \s* (?: @ (?P<site> [^:]+ ) )?
    \s* (?: : (?P<keep> .+ ) )?
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class StageConfig:
    """One method of a pipeline.

    Attributes:
        method: registry name.
        keep: what it keeps; None where the method has its own budget or `patch(keep=...)` sets it.
        options: hyperparameters that differ from the method's defaults.
        site: layer (int, or share of depth) for methods inside the LLM.
    """

    method: str
    keep: Keep | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    site: int | float | None = None

    def __post_init__(self) -> None:
        """Check types; values of options are checked by the method itself."""
        if not isinstance(self.method, str) or not self.method:
            raise ConfigTypeError(
                f"A stage's method is {self.method!r}; it must be a registered name."
            )
        if self.keep is not None:
            object.__setattr__(self, "keep", parse_keep(self.keep))

    def to_spec(self) -> str:
        """The stage as a spec string."""
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        site = "" if self.site is None else f"@{self.site}"
        return f"{self.method}{f'({options})' if options else ''}{site}{_keep_spec(self.keep)}"

    @classmethod
    def from_spec(cls, spec: str) -> StageConfig:
        """Parse one stage of a spec string."""
        match = _STAGE.fullmatch(spec.rstrip())
        if match is None:
            raise ConfigError(
                f"Stage {spec!r} of the spec cannot be read; "
                "write name, name:keep, name(option=value):keep or name@layer:keep."
            )
        keep, site = match["keep"], match["site"]
        return cls(
            match["method"],
            None if keep is None else _parse_keep_spec(keep),
            _parse_options(match["options"] or "", spec),
            None if site is None else _number(site, f"the site of stage {spec!r}"),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict."""
        keep: Any = self.keep
        if isinstance(keep, AutoKeep):
            keep = {"auto": keep.tau}
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}
        return {"method": self.method, "keep": keep, "options": options, "site": self.site}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StageConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: for missing or unknown keys.
        """
        _check_keys(data, {"method"}, {"keep", "options", "site"}, "stage")
        keep = data.get("keep")
        if isinstance(keep, Mapping):
            _check_keys(keep, {"auto"}, set(), "keep")
            keep = AutoKeep(keep["auto"])
        options = data.get("options") or {}
        if not isinstance(options, Mapping):
            raise ConfigTypeError(f"A stage's options are {options!r}; they must be a mapping.")
        return cls(data["method"], keep, _tuples(options), data.get("site"))


@dataclass(frozen=True)
class CompressionConfig:
    """A pipeline of stages and how it is placed in the LLM.

    Attributes:
        stages: applied in order.
        positions: `contiguous` renumbers kept tokens, `original` keeps their ids, `auto` is
            contiguous for 1-D RoPE and original for M-RoPE.
        seed: for methods that draw numbers.
        version: of the file format.
        trained_keep: lowest and highest budget that weights which go with the stages were trained
            for, both shares or both counts; None where there is no such limit. It is one on the
            budget of the last stage between tower and LLM, or where there is none, of the last.
    """

    stages: tuple[StageConfig, ...]
    positions: Positions = "auto"
    seed: int = 0
    version: int = CONFIG_VERSION
    trained_keep: TrainedKeep | None = None

    def __post_init__(self) -> None:
        """Check values and refuse newer file formats."""
        if self.positions not in get_args(Positions):
            raise ConfigError(
                f"positions is {self.positions!r}; allowed are "
                f"{', '.join(map(repr, get_args(Positions)))}."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigTypeError(f"seed is {self.seed!r}; it must be an int.")
        if not isinstance(self.version, int) or self.version > CONFIG_VERSION:
            raise ConfigError(
                f"The configuration has version {self.version!r}, this vlmcompress reads up to "
                f"{CONFIG_VERSION}; upgrade vlmcompress."
            )
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ConfigError("A configuration needs at least one stage.")
        if self.trained_keep is not None:
            object.__setattr__(self, "trained_keep", parse_trained_keep(self.trained_keep))
            object.__setattr__(self, "version", CONFIG_VERSION)

    @classmethod
    def from_spec(
        cls, spec: str, *, positions: Positions = "auto", seed: int = 0
    ) -> CompressionConfig:
        """Parse a spec string such as `"vtc_cls:0.25 | fastv@2:0.5"`."""
        return cls(tuple(StageConfig.from_spec(part) for part in spec.split("|")), positions, seed)

    def to_spec(self) -> str:
        """The stages as a spec string (positions and seed are not part of it)."""
        return " | ".join(stage.to_spec() for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict."""
        stages = [stage.to_dict() for stage in self.stages]
        limit = {} if self.trained_keep is None else {"trained_keep": list(self.trained_keep)}
        return {
            "version": self.version,
            "stages": stages,
            "positions": self.positions,
            "seed": self.seed,
            **limit,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: for missing or unknown keys or a newer version.
        """
        version = data.get("version") if isinstance(data, Mapping) else None
        if isinstance(version, int) and version > CONFIG_VERSION:
            # Said before unknown keys are, since a newer format may well have new keys.
            return cls((StageConfig("newer"),), version=version)
        optional = {"positions", "seed"} if version == 1 else {"positions", "seed", "trained_keep"}
        _check_keys(data, {"version", "stages"}, optional, "configuration")
        if not isinstance(data["stages"], Sequence) or isinstance(data["stages"], str):
            raise ConfigTypeError(f"stages is {data['stages']!r}; it must be a list.")
        return cls(
            tuple(StageConfig.from_dict(stage) for stage in data["stages"]),
            data.get("positions", "auto"),
            data.get("seed", 0),
            data["version"],
            data.get("trained_keep"),
        )

    def save(self, folder: str | Path) -> Path:
        """Write `vlmcompress_config.json` into `folder` and return its path."""
        path = Path(folder) / CONFIG_NAME
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> CompressionConfig:
        """Read `vlmcompress_config.json` from a folder (or the file itself).

        Raises:
            ConfigError: when the file is no valid configuration.
        """
        path = Path(folder)
        path = path / CONFIG_NAME if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} is no valid JSON ({error}); write it with `save`."
            ) from error
        return cls.from_dict(data)


def _keep_spec(keep: Keep | None) -> str:
    if keep is None:
        return ""
    return f":auto({keep.tau})" if isinstance(keep, AutoKeep) else f":{keep}"


def _parse_keep_spec(text: str) -> Keep:
    text = text.strip()
    match = re.fullmatch(r"auto\((.+)\)", text)
    if match is not None:
        return AutoKeep(_number(match[1], "auto's share"))
    return parse_keep(text if text == "auto" else _number(text, "keep"))


def _number(text: str, what: str) -> int | float:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{what} is {text.strip()!r}; it must be a number.")
    return value


def _parse_options(text: str, spec: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)  # by construction of the text above
        if call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("only name=value pairs are allowed")
        return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"The options of stage {spec!r} cannot be read ({error}).") from error


def _check_keys(data: object, required: set[str], optional: set[str], what: str) -> None:
    if not isinstance(data, Mapping):
        raise ConfigTypeError(f"A {what} must be a mapping, not {data!r}.")
    missing, unknown = required - set(data), set(data) - required - optional
    if missing or unknown:
        raise ConfigError(
            f"A {what} has missing keys {sorted(missing)} and unknown keys {sorted(unknown)}; "
            f"allowed are {sorted(required | optional)}."
        )


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
