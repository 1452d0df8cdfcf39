"""Putting the hooks on a model, taking them off, and what is checked before."""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch import nn

from vlmcompress.core.errors import (
    ConfigError,
    EvidenceError,
    MissingTextError,
    UnsupportedModelError,
)
from vlmcompress.families import Family
from vlmcompress.families.decoders import decoder_of
from vlmcompress.live import positions
from vlmcompress.live.clip import TextSource
from vlmcompress.live.compiled import Untraced, forget_compiled, unwrapped
from vlmcompress.live.entrance import EntranceHooks
from vlmcompress.live.evidence import EvidenceHooks
from vlmcompress.live.forward import after_forward, before_forward
from vlmcompress.live.inside import check_tower
from vlmcompress.live.layers import LayerHooks
from vlmcompress.live.reduction import ReductionHooks
from vlmcompress.live.state import ATTRIBUTE, State
from vlmcompress.live.tower import hook_connector, make_skippable, undo_skippable
from vlmcompress.methods.pipeline import Pipeline
from vlmcompress.methods.stages import Resolved
from vlmcompress.methods.tower.exiting import TowerExit


def outer_model(model: Any) -> Any:
    """The transformers model inside a PEFT model or `torch.compile(model)`.

    Raises:
        UnsupportedModelError: for other wrappers, such as `DistributedDataParallel`.
    """
    model = unwrapped(model)
    model = unwrapped(model.get_base_model() if hasattr(model, "get_base_model") else model)
    if isinstance(getattr(model, "module", None), nn.Module) and not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} wraps the model; patch the one inside it: "
            "patch(model.module, ...)."
        )
    return model


def check_seam(model: Any) -> None:
    """Refuse models that take no encoder outputs.

    Raises:
        UnsupportedModelError: for a transformers that is too old.
    """
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} of this transformers has no mm_encoder_outputs argument; "
            "vlmcompress needs transformers >= 5.18."
        )


def check_evidence(
    family: Family, base: nn.Module, built: Pipeline, clip: TextSource | None = None
) -> None:
    """Refuse at patch time what could only fail at the first image."""
    _check_order(family, built)
    if built.tower is not None:
        check_tower(family, base, built.tower)
    needs, tower = built.needs(), family.tower(base)
    if built.tower is not None and isinstance(built.tower.method, TowerExit) and needs.layers:
        raise EvidenceError(
            f"{built.tower.method.name} may leave the tower before the layers that a "
            "later stage reads; use a method that looks at features, such as 'divprune'."
        )
    if needs.text:
        _check_text(family, base, built, clip)
    if not needs.layers and not needs.cls and not needs.norms:
        return
    names = ", ".join(
        repr(s.method.name)
        for s in built.stages
        if s.needs().layers or s.needs().cls or s.needs().norms
    )
    if tower is None:
        raise EvidenceError(
            f"{names} read(s) layers of the tower, which cannot be read in this "
            f"{family.model_type} model; use a method that needs none, such as 'divprune'."
        )
    if not tower.has_cls and any(s.outliers.needs().cls for s in built.stages):
        raise EvidenceError(
            f"exclude_outliers='cls' reads [CLS] attention and this {family.model_type} tower has "
            "no [CLS] token; use exclude_outliers='norm'."
        )
    if needs.cls and not tower.has_cls:
        raise EvidenceError(
            f"{names} read(s) [CLS] attention and this {family.model_type} tower has no [CLS] "
            "token; use 'received_attention' or 'divprune'."
        )
    if needs.cls_features and family.connector(base) is None:
        raise EvidenceError(
            f"{names} send(s) the state of [CLS] through the connector, and the connector of this "
            f"{family.model_type} takes the patches of whole images; use faithful=False."
        )
    read = Resolved.of(needs, len(tower.layers(family.tower_module(base))))
    whole = family.whole_layers(base)
    if whole is not None and (windowed := read.attention() - whole):
        raise EvidenceError(
            f"{names} read(s) the attention of tower layer {min(windowed)}, which is over windows "
            f"of the image in this {family.model_type} model; layers "
            f"{', '.join(map(str, sorted(whole)))} see all of it, so give the method one of them, "
            "or use a method that needs none, such as 'divprune'."
        )


def _check_text(family: Family, base: nn.Module, built: Pipeline, clip: TextSource | None) -> None:
    """Refuse methods that read the question where patches cannot be compared with it."""
    names = ", ".join(repr(s.method.name) for s in built.stages if s.method.needs().text)
    states = family.connector(base) is not None and family.connector_reads_states
    if not states or _reads_several(family, base):
        raise EvidenceError(
            f"{names} compare(s) the question with the tower's states before the connector, which "
            f"cannot be read token by token in this {family.model_type} model; use a method that "
            "looks at the picture alone."
        )
    if clip is None:
        raise MissingTextError(
            f"{names} read(s) the question: pass patch(..., clip=...), the CLIP model whose vision "
            "tower this is (a hub id, a transformers CLIPModel, or (open_clip model, tokenizer))."
        )
    width = getattr(getattr(family.tower_module(base), "config", None), "hidden_size", clip.width)
    if width != clip.width:
        raise EvidenceError(
            f"The CLIP model given takes states of width {clip.width}, and this vision tower's "
            f"have {width}; pass the CLIP model that the tower was taken from."
        )


def _reads_several(family: Family, base: nn.Module) -> bool:
    """Whether the connector reads several layers side by side."""
    tower = family.tower(base)
    if tower is None:
        return False
    return len(family.read_layers(base, {}, len(tower.layers(family.tower_module(base))))) > 1


def _check_order(family: Family, built: Pipeline) -> None:
    """Refuse original positions for rows that are not in the order of their places."""
    if positions.resolve(built.config.positions, family) != "original":
        return
    for stage in built.stages:
        if not stage.method.raster_order:
            raise ConfigError(
                f"{stage.method.name} with faithful=True leaves tokens in another order than that "
                "of their places, so they have no original positions; use "
                "positions='contiguous' or faithful=False."
            )


def install(model: Any, state: State) -> None:
    """Put every hook on, and the one attribute."""
    follow_stages(model, state, state.settings.pipeline)
    base, family = model.base_model, state.family
    tower = family.tower(base)
    if tower is not None:
        layers = tower.layers(family.tower_module(base))
        state.evidence = EvidenceHooks(tower, layers)
        make_skippable(layers)
    connector = family.connector(base)
    if connector is not None:
        state.handles += hook_connector(connector)
    before, after = Untraced(before_forward), Untraced(after_forward)
    state.handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
    state.handles.append(model.register_forward_hook(after, with_kwargs=True))
    _put_generate_on(model, state)
    model.__dict__[ATTRIBUTE] = state
    forget_compiled(model)


def follow_stages(model: Any, state: State, built: Pipeline) -> None:
    """Put the hooks of stages inside tower and LLM on, where `built` first needs them."""
    _follow_tower(model, state, built)
    if built.decoder and state.layers is None:
        state.layers = LayerHooks(model, decoder_of(model))
        forget_compiled(model)
    if built.prompt is not None and state.entrance is None:
        state.entrance = EntranceHooks(model, decoder_of(model))
        forget_compiled(model)


def _follow_tower(model: Any, state: State, built: Pipeline) -> None:
    tower = state.family.tower(model.base_model)
    if built.tower is None or state.reduction is not None or tower is None:
        return
    layers = tower.layers(state.family.tower_module(model.base_model))
    state.reduction = ReductionHooks(tower, layers)
    forget_compiled(model)


def uninstall(model: Any, state: State) -> None:
    """Inverse of `install`."""
    base, family = model.base_model, state.family
    tower = family.tower(base)
    if tower is not None:
        undo_skippable(tower.layers(family.tower_module(base)))
    if state.evidence is not None:
        state.evidence.remove()
    if state.reduction is not None:
        state.reduction.remove()
    if state.layers is not None:
        state.layers.remove()
    if state.entrance is not None:
        state.entrance.remove()
    for handle in state.handles:
        handle.remove()
    _put_generate_back(model, state)
    del model.__dict__[ATTRIBUTE]
    forget_compiled(model)


def _put_generate_on(model: Any, state: State) -> None:
    """Ours in the place of one that others had set; one that wraps ours stays and leads to it."""
    previous = model.__dict__.get("generate")
    wrapped = previous
    while wrapped is not None and not _is_ours(wrapped):
        wrapped = getattr(wrapped, "__wrapped__", None)
    if wrapped is None:
        state.generate = previous
        model.__dict__["generate"] = types.MethodType(_generate(), model)


def _put_generate_back(model: Any, state: State) -> None:
    """Leave one that others have wrapped around ours since; ours then finds no state."""
    if not _is_ours(model.__dict__.get("generate")):
        return
    del model.__dict__["generate"]
    if state.generate is not None:
        model.__dict__["generate"] = state.generate


def _is_ours(method: Any) -> bool:
    return getattr(method, "__func__", None) is _generate()


def _generate() -> Any:
    # Here, where a model has loaded transformers' generation already: `import transformers` leaves
    # that for later, and so does `from vlmcompress import patch`.
    from vlmcompress.live.generate import generate

    return generate
