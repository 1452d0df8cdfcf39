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
from vlmcompress.methods.limits import refuse_untrained
from vlmcompress.methods.pipeline import Pipeline, TowerStage

DEFAULT_METHOD = "tome_tower"


def patch_bare(
    model: nn.Module,
    family: BareFamily,
    method: Any,
    keep: Any,
    *,
    processor: Any,
    seed: int,
    force: bool,
) -> BareHandle:
    """`patch` for a vision transformer without a language model.

    Raises:
        AlreadyPatchedError: when a model that it is part of is patched.
        ConfigError: for methods that act behind the tower, and budgets that cannot be met.
        EvidenceError: for methods that follow a [CLS] token which it does not have.
        UnsupportedModelError: when its attention cannot weigh keys, or be made anew, and the
            method wants that.
        CheckpointError: for a file of trained parts that cannot be used.
    """
    host, layers = _host(model, family), _layers(model, family)
    if state_of(host) is not None or any(map(is_skippable, layers)):
        raise AlreadyPatchedError(
            f"The vision tower of this {type(model).__name__} is patched already, by itself or as "
            "part of another model; call handle.remove() on that handle first."
        )
    built = pipeline.build(inside_tower(method), keep, default=DEFAULT_METHOD, seed=seed)
    if not force:
        refuse_untrained(built)
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

    def _positions(self) -> None:
        """None: there is no language model."""

    def _rebuilt(self, *, force: bool = False, **changes: Any) -> Pipeline:
        refuse_language(self._model, positions=changes["positions"])
        changes |= {"method": inside_tower(changes["method"]), "positions": None}
        now = self._state.settings.pipeline
        new = pipeline.rebuild(now, **changes)
        if not force:
            refuse_untrained(new)
        _check(self._model, self._family, new)
        return learning(new, _place(self._model, self._family), now)

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
    behind = [method.name for method in built.templates if method.stage != "tower"]
    if stage is None or behind:
        raise ConfigError(
            f"{', '.join(map(repr, behind))} act(s) behind the tower, and {name} has no language "
            "model there; methods inside the tower that need no training are "
            f"{', '.join(names_inside(cls=tower.has_cls))}."
        )
    if stage.method.needs_cls and not tower.has_cls:
        raise EvidenceError(
            f"{stage.method.name} follows the [CLS] token, and this {name} has none; use "
            f"{', '.join(names_inside(cls=False))}."
        )
    host, layers = _host(model, family), _layers(model, family)
    check_kernel(host, stage)
    _check_flex(host, stage)
    check_attention(stage, name, tower, host)
    _check_mask(layers[0].get_submodule(tower.attention), tower, stage)
    n, depth = family.patches, len(layers)
    if n is not None and (stage.keep is None or stage.method.tokens_kept(n, stage.keep) < n):
        stage.method.schedule(n, stage.keep, depth, depth - 1)


def _check_flex(host: nn.Module, stage: TowerStage) -> None:
    """Refuse flex attention on a CPU where keys are weighed: torch's compiled kernel aborts."""
    kernel = getattr(getattr(host, "config", None), "_attn_implementation", "")
    on_cpu = next(host.parameters()).device.type == "cpu"
    if stage.method.weighs_keys and kernel == "flex_attention" and on_cpu:
        raise UnsupportedModelError(
            f"{stage.method.name} adds the log of what each token stands for to its attention "
            "logits, and with such a bias torch's compiled flex attention ends the whole process "
            "on a CPU; load the tower with attn_implementation='sdpa', move it to a GPU, or use "
            "proportional=False."
        )


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
