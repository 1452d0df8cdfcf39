"""What a sweep asks of: methods with what they keep, controls, and a trained adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from eval_harness.asking import BLIND, FULL, Entry
from eval_harness.provenance import source
from eval_harness.shelf import Shelved
from vlmcompress.core.config import StageConfig
from vlmcompress.core.errors import ConfigError
from vlmcompress.core.keep import parse_keep
from vlmcompress.methods import pipeline

RANDOM = "random"


@dataclass(frozen=True)
class Setting:
    """A method with what it keeps: one row of the table.

    Attributes:
        method: a name or a spec string; `full` is the model without a method, `blind` the model
            without a picture.
        keep: a fraction, a count or `auto`; None where the method says it itself.
        against: what `random` keeps that this is compared with; None where no share can be told.
        runs: how often it is asked, each time with another seed.
        adapter: name of the adapter whose method it is, or whose LoRA the full model has.
        digest: of that adapter's files.
    """

    method: str
    keep: float | int | str | None = None
    against: float | int | str | None = None
    runs: int = 1
    adapter: str = ""
    digest: str = ""

    @property
    def shown(self) -> str:
        """For readers: the method, or the adapter that brings it."""
        if not self.adapter:
            return self.method
        return self.adapter if self.compresses else f"{self.adapter}, all tokens"

    @property
    def label(self) -> str:
        """`divprune:0.1`."""
        return self.shown if self.keep is None else f"{self.shown}:{self.keep}"

    @property
    def compresses(self) -> bool:
        """Whether there is a method at all."""
        return self.method not in (FULL, BLIND)


def identity_of(setting: Setting) -> str:
    """Hash of the files that define a setting's methods, and its adapter; empty without any."""
    return (source(setting.method) if setting.compresses else "") + setting.digest


def settings_of(
    methods: Sequence[Any],
    keeps: Sequence[float | int | str],
    *,
    seeds: int = 1,
    adapter: Shelved | None = None,
) -> tuple[Setting, ...]:
    """Every setting of a sweep, controls first.

    Args:
        methods: names and spec strings, or mappings with `method` and `keeps`; `blind` asks
            without a picture. Specs that say how much stays are asked once, others at each keep.
        keeps: of methods that name none.
        seeds: runs of methods that draw numbers.
        adapter: to be asked as well, see `adapted`.

    Raises:
        ConfigError: for a setting given twice, a method without a budget, or `seeds` below 1.
        UnknownMethodError: for an unknown method.
    """
    if not isinstance(seeds, int) or seeds < 1:
        raise ConfigError(f"seeds is {seeds!r}; it must be 1 or more.")
    asked = [one for method in methods for one in _expanded(method, keeps, seeds)]
    asked += [] if adapter is None else adapted(adapter, keeps)
    labels = [setting.label for setting in asked]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ConfigError(f"Asked twice: {', '.join(sorted(twice))}; name every setting once.")
    randoms = {s.keep: s for s in asked if s.method == RANDOM}
    for keep in [s.against for s in asked if s.against is not None]:
        randoms.setdefault(keep, Setting(RANDOM, keep, runs=seeds))
    rest = [s for s in asked if s.adapter or s.method not in (FULL, RANDOM)]
    return (Setting(FULL), *(dataclasses.replace(s, against=None) for s in randoms.values()), *rest)


def adapted(adapter: Shelved, keeps: Sequence[float | int | str]) -> tuple[Setting, ...]:
    """The settings of a trained adapter: its method, and its LoRA on all tokens.

    Args:
        adapter: it is asked at those of `keeps` that it was trained for, or else at its own.
        keeps: of the sweep.
    """
    found = adapter.found
    inside = [keep for keep in keeps if adapter.trained_for(keep)]
    own = (Setting(FULL),) if found.lora else ()
    asked = [
        Setting(found.trained, keep, None if keep is None else _reached(found.trained, keep))
        for keep in inside or found.keeps
    ]
    about = {"adapter": adapter.name, "digest": adapter.digest}
    return tuple(dataclasses.replace(setting, **about) for setting in (*own, *asked))


def _expanded(method: Any, keeps: Sequence[Any], seeds: int) -> list[Setting]:
    name, own = _named(method)
    if name in (FULL, BLIND):
        return [Setting(name)]
    entry = Entry.of(name)
    runs = seeds if entry.stochastic else 1
    try:
        stages = pipeline.build(name).config.stages
    except ConfigError:
        pipeline.build(name, keep=1)  # what is wrong with it apart from the budget
        budgets = [*(keeps if own is None else own)]
        if not budgets:
            raise ConfigError(
                f"Method {name!r} does not say how much it keeps; give keeps, or write {name}:0.1."
            ) from None
        for keep in budgets:
            pipeline.build(name, parse_keep(keep))
        return [Setting(name, keep, _reached(name, keep), runs) for keep in budgets]
    if own is not None:
        raise ConfigError(f"Method {name!r} says how much it keeps, and so do its keeps {own}.")
    return [Setting(name, None, _share(stages), runs)]


def _named(method: Any) -> tuple[str, Sequence[Any] | None]:
    if isinstance(method, str):
        return method, None
    if isinstance(method, Mapping) and set(method) <= {"method", "keeps"} and "method" in method:
        keeps = method.get("keeps")
        return str(method["method"]), [keeps] if isinstance(keeps, float | int | str) else keeps
    raise ConfigError(
        f"A method is {method!r}; allowed are a name, a spec string, and a mapping with 'method' "
        "and 'keeps'."
    )


def _reached(name: str, keep: float | int | str) -> float | int | str | None:
    if keep == "auto":  # how many that is differs by image
        return None
    return _share(pipeline.build(name, keep).config.stages)


def _share(stages: Iterable[StageConfig]) -> float | int | None:
    """What is left of an image behind all stages: a share or a count; None if content decides."""
    kept = [stage.keep for stage in stages]
    told = [keep for keep in kept if isinstance(keep, float | int)]
    return reduce(_then, told) if len(told) == len(kept) else None


def _then(before: float | int, keep: float | int) -> float | int:
    if isinstance(keep, int):
        return keep
    return max(1, round(before * keep)) if isinstance(before, int) else before * keep
