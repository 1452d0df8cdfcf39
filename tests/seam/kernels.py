"""Attention kernels as the equalities run them: which exist here, and two that are run on CPU.

`fake_flash` is transformers' own FlashAttention path (2-D masks, unpadding, packed sequences told
from gapped positions, sliding windows) with a plain attention in place of the innermost kernel.
`flex_attention` is torch's, interpreted: compiling it for every mask would take minutes.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flash_attention, flex_attention

from tests import tiny


def missing(kernel: str) -> str | None:
    """Why a kernel cannot run on this machine, None where it can."""
    if kernel != "flash_attention_2":
        return None
    if torch.cuda.is_available() and importlib.util.find_spec("flash_attn"):
        return None
    return "needs a CUDA device and the flash-attn package"


def build(family: str, kernel: str, dtype: torch.dtype) -> PreTrainedModel:
    """A tiny model whose every attention, in tower and language model, runs `kernel`."""
    if kernel == "fake_flash":
        register_fake_flash()
    if kernel == "flex_attention":
        interpret_flex()
    model = tiny.build(family, attn_implementation=kernel, dtype=dtype)
    return model.to("cuda") if kernel == "flash_attention_2" else model


def register_fake_flash() -> None:
    """Make `fake_flash` known to transformers, with FlashAttention's masks."""
    AttentionInterface.register("fake_flash", fake_flash)
    AttentionMaskInterface.register("fake_flash", masking_utils.flash_attention_mask)
    _load("fake_flash")


def fake_flash(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention function of `fake_flash`: transformers' for FlashAttention, kernel replaced."""
    _load(module.config._attn_implementation)
    return flash_attention.flash_attention_forward(module, *args, **kwargs)


def _load(name: str) -> None:
    """Leave what `lazy_import_flash_attention` leaves after it has loaded a kernel of this name."""
    if flash._loaded_implementation == name:
        return
    flash._flash_fn, flash._flash_varlen_fn = _dense, _dense_varlen
    flash._flash_with_kvcache_fn = None
    flash._pad_fn, flash._unpad_fn = flash._pad_input, flash._unpad_input
    flash._process_flash_kwargs_fn = flash._lazy_define_process_function(_dense_varlen)
    flash._loaded_implementation = name


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """`flash_attn_func`: [b, n, heads, d] in and out; the last query sees up to the last key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    back = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    back = back - torch.arange(k.shape[2], device=q.device)
    left, right = window_size
    seen = torch.ones_like(back, dtype=torch.bool)
    if causal or right >= 0:
        seen &= back >= -(0 if causal else right)
    if left >= 0:
        seen &= back <= left
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=dropout_p, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _dense_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """`flash_attn_varlen_func`: sequences one after the other, [total, heads, d]."""
    parts = (x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k))
    sequences = (x.split(p) for x, p in zip((q, k, v), parts, strict=True))
    rest = (dropout_p, softmax_scale, causal, window_size)
    return torch.cat(
        [_dense(*(x[None] for x in one), *rest)[0] for one in zip(*sequences, strict=True)]
    )


@functools.cache
def interpret_flex() -> None:
    """Let flex attention run uncompiled in this process."""
    torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    create = masking_utils.create_block_mask

    def attend(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: Any):
        return torch.nn.attention.flex_attention.flex_attention(query, key, value, **kwargs)

    def create_block_mask(*args: Any, _compile: bool = False, **kwargs: Any):
        return create(*args, **kwargs)

    flex_attention.compile_friendly_flex_attention = attend
    masking_utils.create_block_mask = create_block_mask
