"""CLIP models of open_clip, and their image towers alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmcompress.families.bare import BareFamily, refuse
from vlmcompress.families.bare_timm import family_of as timm_family_of
from vlmcompress.families.towers import InnerTower


def family_of(model: Any) -> BareFamily:
    """The facts about an open_clip model.

    Raises:
        UnsupportedModelError: for image towers that are no vision transformers.
    """
    path = "visual" if isinstance(getattr(model, "visual", None), nn.Module) else ""
    host = model.get_submodule(path)
    if isinstance(getattr(host, "trunk", None), nn.Module):
        return _of_timm(model, f"{path}.trunk".lstrip("."), host)
    if type(host).__name__ != "VisionTransformer":
        raise refuse(model, f"has a {type(host).__name__} for images")
    blocks = host.transformer.resblocks
    return BareFamily(
        model_type=type(model).__name__,
        tower_path=path,
        own_tower=InnerTower(
            has_cls=True,
            batch_first=bool(getattr(host.transformer, "batch_first", False)),
            own=_own_attention(host, blocks),
        ),
        patch_size=tuple(host.patch_size),
        patches=host.grid_size[0] * host.grid_size[1],
        **_pooling(host),
    )


def _of_timm(model: Any, path: str, host: Any) -> BareFamily:
    """A tower of timm; its head must read what the trunk has pooled."""
    if not getattr(host.trunk, "global_pool", ""):
        raise refuse(model, "pools the rows of its timm trunk outside of it, by their places")
    return timm_family_of(model, path)


def _own_attention(host: Any, blocks: Any) -> bool:
    """Whether the blocks attend by open_clip's own module.

    Raises:
        UnsupportedModelError: for blocks that cannot run in halves.
    """
    kinds = {type(block).__name__ for block in blocks}
    if kinds == {"ResidualAttentionBlock"}:
        return False
    if kinds != {"CustomResidualAttentionBlock"}:
        raise refuse(host, f"is made of {' and '.join(sorted(kinds))}")
    for block in blocks:
        if not isinstance(block.ln_attn, nn.Identity):
            raise refuse(host, "normalises what its attention gives (scale_attn)")
        if block.attn.logit_scale is not None:
            raise refuse(host, "attends by cosines (scaled_cosine)")
    return True


def _pooling(host: Any) -> dict[str, Any]:
    """What is averaged or pooled by an attention."""
    if host.attn_pool is not None:
        # One that pools what the first has pooled reads no rows.
        both = getattr(host, "attn_pool_type", "") == "parallel"
        return {"pools": ("attn_pool.attn", *(["attn_pool_contrastive.attn"] if both else []))}
    pool = getattr(host, "pool_type", None)
    if pool != "avg" and not getattr(host, "global_average_pool", False):
        return {}
    # Rows are normalised before the mean or after it.
    return {"averaged": "transformer" if getattr(host, "final_ln_after_pool", False) else "ln_post"}
