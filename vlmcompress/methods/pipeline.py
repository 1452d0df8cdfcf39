"""A pipeline of methods, from whatever a user wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from vlmcompress.core.config import CompressionConfig, StageConfig
from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.core.keep import AutoKeep, Keep, parse_keep
from vlmcompress.methods import registry
from vlmcompress.methods.base import (
    AdaptiveCompressor,
    Method,
    Needs,
    TokenCompressor,
)
from vlmcompress.methods.parts import Partition

#: Options that every connector stage has, beside those of its method.
_PARTITION = tuple(f.name for f in dataclasses.fields(Partition))

Pair: TypeAlias = tuple[StageConfig, Method]


@dataclass(frozen=True)
class Stage:
    """A method with what it keeps.

    Attributes:
        method: ready to run.
        keep: its budget.
        template: the method as configured, before the configuration's seed was filled in.
        partition: what the budget is for in images that were cut into tiles.
    """

    method: TokenCompressor
    keep: Keep
    template: TokenCompressor
    partition: Partition


@dataclass(frozen=True)
class Pipeline:
    """The connector stages of a configuration.

    Attributes:
        stages: applied in order.
        config: the configuration it was made from.
    """

    stages: tuple[Stage, ...]
    config: CompressionConfig

    def split(self) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """Stages that can run before the connector, and the rest."""
        cut = next(
            (i for i, s in enumerate(self.stages) if s.method.reads == "llm"), len(self.stages)
        )
        return self.stages[:cut], self.stages[cut:]

    def needs(self) -> Needs:
        """What all stages together ask for."""
        needs = [stage.method.needs() for stage in self.stages]
        return Needs(
            cls_attention=tuple(layer for n in needs for layer in n.cls_attention),
            received_attention=tuple(layer for n in needs for layer in n.received_attention),
            keys=tuple(layer for n in needs for layer in n.keys),
            text=any(n.text for n in needs),
            wide_cls_attention=tuple(layer for n in needs for layer in n.wide_cls_attention),
            cls_features=any(n.cls_features for n in needs),
        )


def build(
    method: Any,
    keep: Any = None,
    *,
    default: str = "vtc_cls",
    positions: Any = "auto",
    seed: int = 0,
) -> Pipeline:
    """A pipeline from whatever `patch` accepts as `method` and `keep`.

    Args:
        method: None, a name or spec string, a configured method, a `CompressionConfig`, or a list
            of these.
        keep: for the connector stages that carry no budget of their own (with one stage: overrides
            it).
        default: the method that stands for None.
        positions: `auto`, `original` or `contiguous`; a `CompressionConfig` brings its own.
        seed: likewise.

    Raises:
        ConfigError, ConfigTypeError, UnknownMethodError: for values that make no sense.
    """
    if isinstance(method, CompressionConfig):
        positions, seed = method.positions, method.seed
    return _assemble(_parse(method, default), keep, positions, seed)


def rebuild(now: Pipeline, *, method: Any, keep: Any, positions: Any, seed: Any) -> Pipeline:
    """`now` with some things changed; None leaves them. One new method takes over one keep."""
    if method is None:
        pairs: list[Pair] = [
            (c, s.template) for c, s in zip(now.config.stages, now.stages, strict=True)
        ]
    else:
        pairs = _parse(method, "")
        open_stages = [stage for stage, _ in pairs if stage.keep is None]
        if keep is None and len(open_stages) == len(now.stages) == 1:
            keep = now.stages[0].keep
    source = method if isinstance(method, CompressionConfig) else now.config
    return _assemble(
        pairs,
        keep,
        source.positions if positions is None else positions,
        source.seed if seed is None else seed,
    )


def _assemble(pairs: Sequence[Pair], keep: Any, positions: Any, seed: int) -> Pipeline:
    stages = _with_keep([stage for stage, _ in pairs], keep)
    config = CompressionConfig(stages, positions, seed)
    return Pipeline(
        tuple(_stage(c, method, seed) for c, (_, method) in zip(stages, pairs, strict=True)), config
    )


def _stage(config: StageConfig, method: Method, seed: int) -> Stage:
    if not isinstance(method, TokenCompressor):
        raise ConfigError(
            f"Method {config.method!r} acts in the {method.stage}; only methods between tower and "
            "LLM (stage 'connector') can run so far."
        )
    chosen = {name: config.options[name] for name in _PARTITION if name in config.options}
    partition = dataclasses.replace(method.partition, **chosen)
    return Stage(_seeded(method, seed), _checked(config.keep, method), method, partition)


def _parse(method: Any, default: str) -> list[Pair]:
    if isinstance(method, CompressionConfig):
        return [(stage, _create(stage)) for stage in method.stages]
    pairs = [pair for part in _as_list(method, default) for pair in _stages_of(part)]
    if not pairs:
        raise ConfigError("method is an empty list; give at least one method.")
    return pairs


def _as_list(method: Any, default: str) -> list[Any]:
    if method is None:
        return [default]
    return list(method) if isinstance(method, list | tuple) else [method]


def _stages_of(part: Any) -> list[Pair]:
    if isinstance(part, str):
        return [(stage, _create(stage)) for stage in CompressionConfig.from_spec(part).stages]
    if isinstance(part, Method):
        return [(StageConfig(part.name, options=_changed_options(part)), part)]
    if isinstance(part, StageConfig):
        return [(part, _create(part))]
    raise ConfigTypeError(
        f"method is {part!r} ({type(part).__name__}); give a name, a spec string, a configured "
        "method, a CompressionConfig or a list of these."
    )


def _changed_options(method: Method) -> dict[str, Any]:
    defaults = {f.name: f.default for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    return {
        k: getattr(method, k) for k, default in defaults.items() if getattr(method, k) != default
    }


def _create(stage: StageConfig) -> Method:
    if stage.site is not None:
        raise ConfigError(
            f"Stage {stage.to_spec()!r} names a layer, but {stage.method!r} has none."
        )
    options = dict(stage.options)
    if issubclass(registry.get(stage.method), TokenCompressor):
        for name in _PARTITION:
            options.pop(name, None)
    return registry.create(stage.method, **options)


def _with_keep(stages: Sequence[StageConfig], keep: Any) -> tuple[StageConfig, ...]:
    if keep is not None:
        keep = parse_keep(keep)
        open_stages = [s for s in stages if s.keep is None] or (
            list(stages) if len(stages) == 1 else []
        )
        if not open_stages:
            raise ConfigError(
                f"keep={keep!r} was given, but every stage carries its own budget "
                f"({' | '.join(s.to_spec() for s in stages)}); give it in one place."
            )
        return tuple(dataclasses.replace(s, keep=keep) if s in open_stages else s for s in stages)
    for stage in stages:
        if stage.keep is None:
            raise ConfigError(
                f"Method {stage.method!r} has no budget: pass keep=..., for example keep=0.1, or "
                f"write '{stage.method}:0.1'."
            )
    return tuple(stages)


def _seeded(method: TokenCompressor, seed: int) -> TokenCompressor:
    if getattr(method, "seed", 0) is None:
        return dataclasses.replace(method, seed=seed)  # type: ignore[type-var]
    return method


def _checked(keep: Keep | None, method: TokenCompressor) -> Keep:
    assert keep is not None  # _with_keep has seen to it
    adaptive = method.scored or isinstance(method, AdaptiveCompressor)
    if isinstance(keep, AutoKeep) and not adaptive:
        raise ConfigError(
            f"keep='auto' needs scores and {method.name!r} has none; give a fraction or a count, "
            "or use a method that scores tokens, such as 'vtc_cls'."
        )
    return keep
