"""Vision transformers that stand alone, or beside a text tower: classifiers and CLIP models.

What they return is made of [CLS], of a mean over patches or of an attention that pools them; where
that happens is told here, so that every row can count for as many patches as it stands for.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmcompress.core.errors import UnsupportedModelError
from vlmcompress.families.base import Family, Grid
from vlmcompress.families.towers import Tower

#: What an error names as supported.
SUPPORTED_BARE = (
    "CLIP, SigLIP, DINOv2 (with and without registers) and ViT models of transformers, "
    "VisionTransformer of timm, and CLIP models of open_clip whose image tower is a vision "
    "transformer of its own or of timm"
)


@dataclass(frozen=True)
class BareFamily(Family):
    """Facts about one vision transformer; `tower_path` leads to the module whose call is a pass.

    Attributes:
        averaged: path from there to the module of whose output rows a mean is taken; "" for none.
        averages_all: whether [CLS] and registers are among them.
        pools: paths to attention modules that pool rows.
        pools_all: whether [CLS] and registers are among those.
        pool_mask: their argument that is added to the logits, `key_padding_mask` ([b, n]) or
            `attn_mask` ([b, 1, 1, n]).
        patch_size: (h, w) of a patch in pixels.
        patches: of an image of the size that the tower was made for; None where any will do.
    """

    averaged: str = ""
    averages_all: bool = False
    pools: tuple[str, ...] = ()
    pools_all: bool = True
    pool_mask: str = "key_padding_mask"
    patch_size: Grid = (1, 1)
    patches: int | None = None

    def grid(self, pixels: Tensor, n: int) -> Grid:
        """(h, w) in patches of images ([b, 3, H, W]) that came to `n` patches."""
        sides = [side / p for side, p in zip(pixels.shape[-2:], self.patch_size, strict=True)]
        for turned in (math.floor, math.ceil):  # some pad what is no multiple
            h, w = (turned(side) for side in sides)
            if h * w == n:
                return h, w
        side = math.isqrt(n)
        return (side, side) if side * side == n else (1, n)


def bare_family_of(model: Any) -> BareFamily | None:
    """The facts about a vision transformer, or None for anything that is none.

    Raises:
        UnsupportedModelError: for one whose rows cannot be reduced.
    """
    family = _found(model)
    if family is not None:
        _check_parts(model, family)
    return family


def _found(model: Any) -> BareFamily | None:
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    for package in ("open_clip", "timm"):
        if package in packages:
            facts = importlib.import_module(f"vlmcompress.families.bare_{package}")
            return facts.family_of(model)  # type: ignore[no-any-return]
    make = _TRANSFORMERS.get(getattr(getattr(model, "config", None), "model_type", ""))
    return None if make is None else make(model)


def refuse(model: Any, why: str) -> UnsupportedModelError:
    """The error for a vision transformer that cannot be reduced."""
    return UnsupportedModelError(
        f"{type(model).__name__} {why}. Without a language model, supported are {SUPPORTED_BARE}."
    )


def _check_parts(model: nn.Module, family: BareFamily) -> None:
    """Refuse versions of a package whose modules have other names."""
    tower, host = family.own_tower, model.get_submodule(family.tower_path)
    assert tower is not None  # by construction of these families
    norms = [norm for norm in (tower.first_norm, tower.norm) if norm is not None]
    try:
        for layer in tower.layers(host):
            for part in (*norms, tower.mlp, tower.attention):
                layer.get_submodule(part)
            for name in tower.projections:
                layer.get_submodule(tower.attention).get_submodule(name)
        for path in (family.averaged, *family.pools):
            host.get_submodule(path)
    except AttributeError as error:
        raise refuse(model, f"of this version has other parts than expected ({error})") from error


def _named(model: Any, *names: str) -> str:
    """Which of some classes a model is.

    Raises:
        UnsupportedModelError: when it is none of them.
    """
    classes = [cls.__name__ for cls in type(model).__mro__]
    for name in names:
        if name in classes:
            return name
    kind = model.config.model_type
    raise refuse(model, f"is no {' or '.join(names)}, the {kind!r} models that can be reduced")


def _of(model: Any, path: str, config: Any, tower: Tower, **facts: Any) -> BareFamily:
    side, patch = config.image_size, config.patch_size
    height, width = (side, side) if isinstance(side, int) else side
    h, w = (patch, patch) if isinstance(patch, int) else patch
    return BareFamily(
        model_type=type(model).__name__,
        tower_path=path,
        own_tower=tower,
        patch_size=(h, w),
        patches=(height // h) * (width // w),
        **facts,
    )


def _clip(model: Any) -> BareFamily:
    whole = ("CLIPModel", "CLIPForImageClassification")
    name = _named(model, *whole, "CLIPVisionModelWithProjection", "CLIPVisionModel")
    path = "" if name == "CLIPVisionModel" else "vision_model"
    config = model.config.vision_config if name in whole else model.config
    averaged = "encoder" if name == "CLIPForImageClassification" else ""
    return _of(model, path, config, Tower(has_cls=True), averaged=averaged)


def _siglip(model: Any) -> BareFamily:
    name = _named(model, "SiglipModel", "SiglipForImageClassification", "SiglipVisionModel")
    alone = name == "SiglipVisionModel"
    host = model if alone else model.vision_model
    config = model.config if alone else model.config.vision_config
    averaged = "post_layernorm" if name == "SiglipForImageClassification" else ""
    pools = ("head.attention",) if hasattr(host, "head") and not averaged else ()
    path = "" if alone else "vision_model"
    return _of(model, path, config, Tower(), averaged=averaged, pools=pools)


def _dinov2(model: Any) -> BareFamily:
    stem = "Dinov2WithRegisters" if "registers" in model.config.model_type else "Dinov2"
    name = _named(model, f"{stem}Model", f"{stem}ForImageClassification")
    alone = name == f"{stem}Model"
    tower = Tower(
        layers_path="encoder.layer",
        attention="attention",
        has_cls=True,
        norm="norm2",
        first_norm="norm1",
        output="o_proj",
        registers=getattr(model.config, "num_register_tokens", 0),
    )
    path = "" if alone else model.base_model_prefix
    averaged = "" if alone else "layernorm"
    return _of(model, path, model.config, tower, averaged=averaged)


def _vit(model: Any) -> BareFamily:
    name = _named(model, "ViTModel", "ViTForImageClassification")
    tower = Tower(
        layers_path="layers",
        attention="attention",
        has_cls=True,
        norm="layernorm_after",
        first_norm="layernorm_before",
        output="o_proj",
    )
    return _of(model, "" if name == "ViTModel" else "vit", model.config, tower)


_TRANSFORMERS: dict[str, Callable[[Any], BareFamily]] = {
    "clip": _clip,
    "clip_vision_model": _clip,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
    "vit": _vit,
}


def scaled(rows: Tensor, mass: Tensor) -> Tensor:
    """Rows of which a plain mean is the mean by mass.

    Args:
        rows: [b, n, d].
        mass: [b, n], positive.
    """
    share = mass * (mass.shape[1] / mass.sum(1, keepdim=True))
    return rows * share.to(rows.dtype)[..., None]
