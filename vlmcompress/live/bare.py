"""Vision transformers without a language model: a stage inside the tower, around its own forward.

A pass begins with the tower's forward and ends with it, so that every way that leads through it
(`encode_image`, `get_image_features`, a classifier) is shorter, and the text tower of a CLIP model
is none of it. Where rows become one embedding every row counts for as many patches as it stands
for: means are weighted by that number, and attention that pools adds its log to the logits.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import nn

from vlmcompress.core.errors import (
    AlreadyPatchedError,
    ConfigError,
    EvidenceError,
    UnsupportedModelError,
)
from vlmcompress.core.report import Report
from vlmcompress.families.bare import BareFamily
from vlmcompress.families.towers import Tower
from vlmcompress.live.barepass import before_mean, before_pool, begin, end, outside
from vlmcompress.live.compiled import Untraced, forget_compiled
from vlmcompress.live.evidence import EvidenceHooks
from vlmcompress.live.handle import Handle
from vlmcompress.live.inside import TowerPlace, check_attention, check_kernel, learning
from vlmcompress.live.reduction import ReductionHooks
from vlmcompress.live.state import ATTRIBUTE, Settings, State, state_of
from vlmcompress.live.tower import is_skippable, make_skippable, undo_skippable
from vlmcompress.methods import pipeline
from vlmcompress.methods.inside import inside_tower, names_inside
from vlmcompress.methods.pipeline import Pipeline, TowerStage
from vlmcompress.methods.tower.base import TowerReducer

DEFAULT_METHOD = "tome_tower"


def patch_bare(
    model: nn.Module, family: BareFamily, method: Any, keep: Any, *, processor: Any, seed: int
) -> BareHandle:
    """`patch` for a vision transformer without a language model.

    Raises:
        AlreadyPatchedError: when a model that it is part of is patched.
        ConfigError: for methods that act elsewhere.
        EvidenceError: for methods that follow a [CLS] token which it does not have.
        UnsupportedModelError: when its attention cannot weigh keys and the method wants that.
    """
    host, layers = _host(model, family), _layers(model, family)
    if state_of(host) is not None or any(map(is_skippable, layers)):
        raise AlreadyPatchedError(
            f"The vision tower of this {type(model).__name__} is patched already, by itself or as "
            "part of another model; call handle.remove() on that handle first."
        )
    built = pipeline.build(inside_tower(method), keep, default=DEFAULT_METHOD, seed=seed)
    _check(model, family, built)
    built = learning(built, _place(model, family))
    state = State(family, Settings(built, method is None), processor)
    _install(model, family, state)
    return BareHandle(model)


class BareHandle(Handle):
    """The handle of a vision transformer without a language model.

    `last.kept`, `last.assignments` and `last.tower_patches` tell of the patches; there are no
    positions, prompts or caches to tell of.
    """

    @property
    def _family(self) -> BareFamily:
        family = self._state.family
        assert isinstance(family, BareFamily)  # by `patch_bare`
        return family

    @property
    def report(self) -> Report:
        """Counts, costs and choices so far; `print` it."""
        state = self._state
        return Report(
            model=type(self._model).__name__,
            method=self.config.to_spec(),
            chosen="chosen by default" if state.settings.chosen_by_default else "as asked",
            positions=None,
            calls_with_images=state.calls["with"],
            calls_without_images=state.calls["without"],
            last=state.local.last,
        )

    def set(
        self,
        *,
        method: Any = None,
        keep: float | int | str | None = None,
        positions: str | None = None,
        seed: int | None = None,
    ) -> BareHandle:
        """Change what is applied from the next call on; what is not given stays.

        Args:
            method: as for `patch`.
            keep: as for `patch`; a new method without keep takes over the old one's.
            positions: there are none; anything but None raises.
            seed: as for `patch`.

        Raises:
            ConfigError: for positions, and as `patch` does.
        """
        refuse_language(self._model, positions=positions)
        state = self._state
        new = pipeline.rebuild(
            state.settings.pipeline,
            method=inside_tower(method),
            keep=keep,
            positions=None,
            seed=seed,
        )
        _check(self._model, self._family, new)
        new = learning(new, _place(self._model, self._family), state.settings.pipeline)
        state.settings = Settings(new, state.settings.chosen_by_default and method is None)
        return self

    def encode(self, **call: Any) -> Any:
        """There is no language model to ask questions of.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            f"{type(self._model).__name__} has no language model to encode images for; call it."
        )

    def remove(self) -> None:
        """Take everything off; the model is as it came in. A second call does nothing."""
        state = state_of(self._model)
        if state is not None:
            _uninstall(self._model, self._family, state)


def refuse_language(model: nn.Module, **given: Any) -> None:
    """Refuse arguments of `patch` that speak of a language model.

    Raises:
        ConfigError: when any is neither None nor "auto".
    """
    for name, value in given.items():
        if value not in (None, "auto"):
            raise ConfigError(
                f"{name}={value!r} was given, and {type(model).__name__} has no language model; "
                f"leave {name} out."
            )


def _host(model: nn.Module, family: BareFamily) -> nn.Module:
    return model.get_submodule(family.tower_path)


def _tower(family: BareFamily) -> Tower:
    assert family.own_tower is not None  # by construction of these families
    return family.own_tower


def _layers(model: nn.Module, family: BareFamily) -> nn.ModuleList:
    return _tower(family).layers(_host(model, family))


def _place(model: nn.Module, family: BareFamily) -> TowerPlace:
    host, last = _host(model, family), len(_layers(model, family)) - 1
    return TowerPlace(type(model).__name__, _tower(family), host, family.patches, last)


def _check(model: nn.Module, family: BareFamily, built: Pipeline) -> None:
    """Refuse at patch time what could only fail at the first image."""
    stage, tower, name = built.tower, _tower(family), type(model).__name__
    if stage is None or built.stages:
        found = ", ".join(repr(stage.method.name) for stage in built.stages)
        raise ConfigError(
            f"{found} act(s) between a tower and a language model, and {name} has none; methods "
            f"inside the tower are {', '.join(names_inside(cls=tower.has_cls))}."
        )
    if not isinstance(stage.method, TowerReducer) or not stage.method.training_free:
        raise ConfigError(
            f"{stage.method.name} has parts that are trained with a language model behind the "
            f"tower, or makes its attention, and {name} is a tower alone; use "
            f"{', '.join(names_inside(cls=tower.has_cls))}."
        )
    if stage.method.needs_cls and not tower.has_cls:
        raise EvidenceError(
            f"{stage.method.name} follows the [CLS] token, and this {name} has none; use "
            f"{', '.join(names_inside(cls=False))}."
        )
    host, layers = _host(model, family), _layers(model, family)
    check_kernel(host, stage)
    check_attention(stage, name, tower, host)
    _check_mask(layers[0].get_submodule(tower.attention), tower, stage)
    n, depth = family.patches, len(layers)
    if n is not None and (stage.keep is None or stage.method.tokens_kept(n, stage.keep) < n):
        stage.method.schedule(n, stage.keep, depth, depth - 1)


def _check_mask(attention: nn.Module, tower: Tower, stage: TowerStage) -> None:
    """Refuse versions of a package whose attention takes no mask, where one is needed."""
    names = inspect.signature(type(attention).forward).parameters
    if stage.method.weighs_keys and tower.mask not in names:
        raise UnsupportedModelError(
            f"{stage.method.name} adds the log of what each token stands for to its attention "
            f"logits, and {type(attention).__name__} of this version takes no {tower.mask}; update "
            "the package it comes from, or use proportional=False."
        )


def _install(model: nn.Module, family: BareFamily, state: State) -> None:
    host, layers, tower = _host(model, family), _layers(model, family), _tower(family)
    state.evidence = EvidenceHooks(tower, layers)
    state.reduction = ReductionHooks(tower, layers)
    make_skippable(layers)
    first, last = Untraced(begin), Untraced(end)
    state.handles.append(host.register_forward_pre_hook(first, with_kwargs=True))
    state.handles.append(host.register_forward_hook(last, with_kwargs=True, always_call=True))
    state.handles.append(layers[0].register_forward_pre_hook(partial(outside, state)))
    _hook_heads(host, family, state)
    for module in (model, host):
        module.__dict__[ATTRIBUTE] = state
    forget_compiled(model)


def _hook_heads(host: nn.Module, family: BareFamily, state: State) -> None:
    """Let means and attention that pool rows count what each stands for."""
    others = int(_tower(family).has_cls) + _tower(family).registers
    if family.averaged:
        hook = partial(before_mean, 0 if family.averages_all else others)
        averaged = host.get_submodule(family.averaged)
        state.handles.append(averaged.register_forward_hook(hook))
    for path in family.pools:
        hook = partial(before_pool, 0 if family.pools_all else others, family.pool_mask)
        pool = host.get_submodule(path)
        state.handles.append(pool.register_forward_pre_hook(hook, with_kwargs=True))


def _uninstall(model: nn.Module, family: BareFamily, state: State) -> None:
    undo_skippable(_layers(model, family))
    for hooks in (state.evidence, state.reduction, *state.handles):
        if hooks is not None:
            hooks.remove()
    for module in (model, _host(model, family)):
        module.__dict__.pop(ATTRIBUTE, None)
    forget_compiled(model)
