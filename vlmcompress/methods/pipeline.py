"""A pipeline of methods, from whatever a user wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from vlmcompress.core.config import CompressionConfig, StageConfig
from vlmcompress.core.errors import ConfigError, ConfigTypeError
from vlmcompress.core.keep import AutoKeep, Keep, parse_keep
from vlmcompress.core.trained import TrainedKeep
from vlmcompress.methods import registry
from vlmcompress.methods.base import (
    AdaptiveCompressor,
    Method,
    Needs,
    TokenCompressor,
)
from vlmcompress.methods.decoder.base import LayerMethod
from vlmcompress.methods.learned import Learned
from vlmcompress.methods.outliers import Outliers
from vlmcompress.methods.parts import Partition
from vlmcompress.methods.prompt.base import PromptCompressor, check_last
from vlmcompress.methods.tower.base import TowerReducer

#: Options that every connector stage has, beside those of its method.
_PARTITION = tuple(f.name for f in dataclasses.fields(Partition))
_OUTLIERS = tuple(f.name for f in dataclasses.fields(Outliers))

Pair: TypeAlias = tuple[StageConfig, Method]


@dataclass(frozen=True)
class Stage:
    """A method with what it keeps.

    Attributes:
        method: ready to run.
        keep: its budget.
        template: the method as configured, before the configuration's seed was filled in.
        partition: what the budget is for.
        outliers: which patches are left to the last.
        parts: what the method has learnt for this model; None where it learns nothing.
    """

    method: TokenCompressor
    keep: Keep
    template: TokenCompressor
    partition: Partition
    outliers: Outliers
    parts: Learned | None = None

    def needs(self) -> Needs:
        """What method and outliers ask for."""
        return Needs.together([self.method.needs(), self.outliers.needs()])


@dataclass(frozen=True)
class TowerStage:
    """A method inside the tower with what it keeps.

    Attributes:
        method: ready to run.
        keep: share or count of patches that leave the tower, or of keys that its queries look at;
            None for a budget of its own.
        parts: what the method has learnt for this tower; None where it learns nothing.
    """

    method: TowerReducer
    keep: float | int | None
    parts: Learned | None = None

    @property
    def template(self) -> TowerReducer:
        """The method as configured."""
        return self.method


@dataclass(frozen=True)
class LayerStage:
    """A method inside the language model with what it keeps.

    Attributes:
        method: ready to run.
        keep: share or count of visual tokens that leave its last site, or that its layers work
            on; None for a budget of its own.
        template: the method as configured, before the configuration's seed was filled in.
        parts: what the method has learnt for this model; None where it learns nothing.
    """

    method: LayerMethod
    keep: float | int | None
    template: LayerMethod
    parts: Learned | None = None


@dataclass(frozen=True)
class Pipeline:
    """The stages of a configuration.

    Attributes:
        stages: those between tower and LLM, applied in order.
        config: the configuration it was made from.
        tower: the stage inside the tower, if there is one.
        decoder: those inside the language model, in the order given.
    """

    stages: tuple[Stage, ...]
    config: CompressionConfig
    tower: TowerStage | None = None
    decoder: tuple[LayerStage, ...] = ()

    @property
    def running(self) -> tuple[TowerStage | Stage | LayerStage, ...]:
        """The stages of `config.stages`, in their order."""
        tower = () if self.tower is None else (self.tower,)
        return (*tower, *self.stages, *self.decoder)

    @property
    def templates(self) -> tuple[Method, ...]:
        """The methods of `config.stages`, as configured."""
        return tuple(stage.template for stage in self.running)

    @property
    def learning(self) -> tuple[tuple[str, Learned], ...]:
        """Name and parts of every stage that has learnt something, in the order of the path."""
        return tuple((s.method.name, s.parts) for s in self.running if s.parts is not None)

    def switched_off(self) -> Pipeline:
        """The same configuration with no stage."""
        return dataclasses.replace(self, stages=(), tower=None, decoder=())

    def split(self) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """Stages that can run before the connector, and the rest."""
        cut = 0
        for cut, stage in enumerate(self.stages):
            if stage.method.reads == "llm":
                return self.stages[:cut], self.stages[cut:]
            if stage.method.gives == "llm":
                break
        return self.stages[: cut + 1], self.stages[cut + 1 :]

    @property
    def prompt(self) -> PromptCompressor | None:
        """The method that has work left at the language model's entrance, if there is one."""
        method = self.stages[-1].method if self.stages else None
        return method if isinstance(method, PromptCompressor) else None

    @property
    def replaces_connector(self) -> bool:
        """Whether what comes out before the connector are rows of the language model."""
        return any(stage.method.gives == "llm" for stage in self.split()[0])

    @property
    def shares_prompts(self) -> bool:
        """Whether the budget of any stage is that of a whole prompt."""
        return any(stage.partition.scope == "prompt" for stage in self.stages)

    def needs(self) -> Needs:
        """What all stages together ask for."""
        return Needs.together(stage.needs() for stage in self.stages)


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
        keep: for the connector stages that carry no budget of their own, or for the stage in the
            tower where there is no other (with one stage: overrides it).
        default: the method that stands for None.
        positions: `auto`, `original` or `contiguous`; a `CompressionConfig` brings its own.
        seed: likewise.

    Raises:
        ConfigError, ConfigTypeError, UnknownMethodError: for values that make no sense.
    """
    trained = None
    if isinstance(method, CompressionConfig):
        positions, seed, trained = method.positions, method.seed, method.trained_keep
    return _assemble(_parse(method, default), keep, positions, seed, trained)


def rebuild(now: Pipeline, *, method: Any, keep: Any, positions: Any, seed: Any) -> Pipeline:
    """`now` with some things changed; None leaves them. One new method takes over one keep."""
    if method is None:
        pairs: list[Pair] = list(zip(now.config.stages, now.templates, strict=True))
    else:
        pairs = _parse(method, "")
        open_stages = [s for s, own in pairs if s.keep is None and not own.own_budget]
        if keep is None and len(open_stages) == len(now.config.stages) == 1:
            keep = now.config.stages[0].keep
    source = method if isinstance(method, CompressionConfig) else now.config
    return _assemble(
        pairs,
        keep,
        source.positions if positions is None else positions,
        source.seed if seed is None else seed,
        source.trained_keep,
    )


def _assemble(
    pairs: Sequence[Pair], keep: Any, positions: Any, seed: int, trained: TrainedKeep | None
) -> Pipeline:
    stages = _with_keep(pairs, keep)
    config = CompressionConfig(stages, positions, seed, trained_keep=trained)
    methods = [method for _, method in pairs]
    tower = None
    if isinstance(methods[0], TowerReducer):
        tower = _tower_stage(stages[0], methods[0])
        stages, methods = stages[1:], methods[1:]
    cut = next((i for i, m in enumerate(methods) if isinstance(m, LayerMethod)), len(methods))
    rest = list(zip(stages, methods, strict=True))
    connector = tuple(_stage(c, method, seed) for c, method in rest[:cut])
    decoder = tuple(_layer_stage(c, method, seed) for c, method in rest[cut:])
    check_last([stage.method for stage in connector], [stage.method for stage in decoder])
    return Pipeline(connector, config, tower, decoder)


def _layer_stage(config: StageConfig, method: Method, seed: int) -> LayerStage:
    if not isinstance(method, LayerMethod):
        raise ConfigError(
            f"Method {config.method!r} acts in the {method.stage}, before the language model, and "
            "stands behind one that acts inside it; name stages in the order of the path."
        )
    if isinstance(config.keep, AutoKeep):
        raise ConfigError(
            f"keep='auto' is decided before the language model, and {config.method!r} acts inside "
            "it; give a fraction or a count."
        )
    _refuse_two_budgets(config, method.own_budget)
    return LayerStage(_seeded(method, seed), config.keep, method)


def _refuse_two_budgets(config: StageConfig, own: bool) -> None:
    if own and config.keep is not None:
        raise ConfigError(
            f"Stage {config.to_spec()!r} says twice how much stays: by its options and by keep; "
            "give one of them."
        )


def _tower_stage(config: StageConfig, method: TowerReducer) -> TowerStage:
    if isinstance(config.keep, AutoKeep):
        raise ConfigError(
            f"keep='auto' is decided from scores of a finished tower, and {method.name!r} acts "
            "inside it; give a fraction or a count."
        )
    _refuse_two_budgets(config, method.own_budget)
    return TowerStage(method, config.keep)


def _stage(config: StageConfig, method: Method, seed: int) -> Stage:
    if isinstance(method, TowerReducer):
        raise ConfigError(
            f"Method {config.method!r} acts inside the tower, where one method at most can act; "
            "name it once, and before those between tower and LLM."
        )
    if not isinstance(method, TokenCompressor):
        raise ConfigError(
            f"Method {config.method!r} acts in the {method.stage}; use one that acts inside the "
            "tower, between tower and LLM or inside the LLM."
        )
    partition = dataclasses.replace(method.partition, **_chosen(config, _PARTITION))
    outliers = Outliers(**_chosen(config, _OUTLIERS))
    if outliers.exclude_outliers is not None and not method.scored:
        raise ConfigError(
            f"exclude_outliers={outliers.exclude_outliers!r} ranks patches after all others, and "
            f"{method.name!r} ranks none; use a method with scores, such as 'vtc_cls'."
        )
    _refuse_two_budgets(config, method.own_budget)
    keep = _checked(method.own_keep if method.own_budget else config.keep, method)
    if isinstance(keep, AutoKeep) and partition.scope == "prompt":
        raise ConfigError(
            "scope='prompt' shares one budget over the images of a prompt, and keep='auto' is "
            "decided for each image; give a fraction or a count, or another scope."
        )
    return Stage(_seeded(method, seed), keep, method, partition, outliers)


def _chosen(config: StageConfig, names: Sequence[str]) -> dict[str, Any]:
    return {name: config.options[name] for name in names if name in config.options}


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
    options, kind = dict(stage.options), registry.get(stage.method)
    if stage.site is not None:
        if not _has_layers(kind) or "layers" in options:
            raise ConfigError(
                f"Stage {stage.to_spec()!r} names a layer, but {stage.method!r} has none, or has "
                "its layers among its options already."
            )
        options["layers"] = (stage.site,)
    if issubclass(kind, TokenCompressor):
        for name in (*_PARTITION, *_OUTLIERS):
            options.pop(name, None)
    return registry.create(stage.method, **options)


def _has_layers(kind: type[Method]) -> bool:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return issubclass(kind, LayerMethod) and any(field.name == "layers" for field in fields)


def _with_keep(pairs: Sequence[Pair], keep: Any) -> tuple[StageConfig, ...]:
    stages = tuple(stage for stage, _ in pairs)
    if keep is not None:
        keep, wanted = parse_keep(keep), _meant_by_keep(pairs)
        if not wanted:
            raise ConfigError(
                f"keep={keep!r} was given, but every stage carries its own budget "
                f"({' | '.join(s.to_spec() for s in stages)}); give it in one place."
            )
        stages = tuple(
            dataclasses.replace(stage, keep=keep) if i in wanted else stage
            for i, stage in enumerate(stages)
        )
    for stage, (_, method) in zip(stages, pairs, strict=True):
        if stage.keep is None and not method.own_budget:
            raise ConfigError(
                f"Method {stage.method!r} has no budget: pass keep=..., for example keep=0.1, or "
                f"write '{stage.method}:0.1'."
            )
    return stages


def _meant_by_keep(pairs: Sequence[Pair]) -> set[int]:
    """Stages that one `keep` is for: the connector's that have none, else those of other stages."""
    bare = {i for i, (s, m) in enumerate(pairs) if s.keep is None and not m.own_budget}
    connector = {i for i, (_, m) in enumerate(pairs) if isinstance(m, TokenCompressor)}
    if connector & bare:
        return connector & bare
    if bare and not connector:
        return bare
    # A single one is overridden, so that sweeps need not take the pipeline apart.
    return connector if len(connector) == 1 else {0} if len(pairs) == 1 else set()


def _seeded(method: Any, seed: int) -> Any:
    if getattr(method, "seed", 0) is None:
        return dataclasses.replace(method, seed=seed)
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
