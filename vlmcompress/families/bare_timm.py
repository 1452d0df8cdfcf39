"""Vision transformers of timm."""

from __future__ import annotations

from typing import Any

from vlmcompress.families.bare import BareFamily, refuse
from vlmcompress.families.towers import FusedTower

#: How `VisionTransformer` pools, where that can be followed; "" does not.
_POOLS = ("", "token", "avg", "max", "map")


def family_of(model: Any, path: str = "") -> BareFamily:
    """The facts about a timm model, or about the one at `path` of it.

    Raises:
        UnsupportedModelError: for models that are no plain vision transformers.
    """
    host = model.get_submodule(path)
    if not _is(host, "timm.models.vision_transformer", "VisionTransformer"):
        raise refuse(host, "is no VisionTransformer of timm")
    _check_blocks(host)
    pooled, size = _pooling(host), host.patch_embed.patch_size
    has_cls = host.cls_token is not None
    tower = FusedTower(has_cls=has_cls, registers=int(host.num_prefix_tokens) - has_cls)
    return BareFamily(
        model_type=type(model).__name__,
        tower_path=path,
        own_tower=tower,
        patch_size=(size, size) if isinstance(size, int) else tuple(size),
        patches=getattr(host.patch_embed, "num_patches", None),
        **pooled,
    )


def _pooling(host: Any) -> dict[str, Any]:
    """What is averaged or pooled by an attention."""
    pool, everything = host.global_pool, bool(getattr(host, "pool_include_prefix", False))
    if pool not in _POOLS:
        raise refuse(
            host, f"pools by {pool!r}; what can be followed is {', '.join(map(repr, _POOLS))}"
        )
    if pool == "avg":
        return {"averaged": "norm", "averages_all": everything}
    if pool != "map":
        return {}
    if getattr(host.attn_pool, "pos_embed", None) is not None:
        raise refuse(host, "pools by an attention that knows places, which reduced rows have not")
    return {"pools": ("attn_pool",), "pools_all": everything, "pool_mask": "attn_mask"}


def _check_blocks(host: Any) -> None:
    for block in host.blocks:
        if not _is(block, "timm.models.vision_transformer", "Block"):
            raise refuse(host, f"is made of {type(block).__name__}s; plain Blocks can be reduced")
        if type(block.attn).__name__ != "Attention":
            raise refuse(host, f"attends by {type(block.attn).__name__}; Attention can be followed")


def _is(module: Any, home: str, name: str) -> bool:
    return any(cls.__module__ == home and cls.__name__ == name for cls in type(module).__mro__)
