"""Soft masks: in training, later layers attend to a row the less the more it would be dropped.

A mask m in (0, 1] multiplies what every query pays a key before the softmax divides by the sum, so
that log(m) is added to the key's logits, and m = 0 is a row that is not there. It goes through the
additive mask of the model's own kernel, so that gradients reach it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmcompress.core.errors import UnsupportedInputError, UnsupportedModelError
from vlmcompress.families.decoders import Decoder
from vlmcompress.live.rows import Rows

#: Kernels that take an additive mask and hand gradients to it.
KERNELS = ("sdpa", "eager")
#: What is added where nothing may be seen: finite, so that a row of padding has a softmax, and also
#: in bfloat16, to which autocast turns it.
_HIDDEN = -1e30


def check(method: str, decoder: Decoder) -> None:
    """Refuse kernels that take no additive mask.

    Raises:
        UnsupportedModelError: for such a kernel.
    """
    kernel = getattr(decoder.config, "_attn_implementation", None) or "eager"
    if kernel not in KERNELS:
        raise UnsupportedModelError(
            f"{method} trains with soft masks on the attention, and the language model's kernel "
            f"{kernel!r} takes none that is learnt; load the model with "
            "attn_implementation='sdpa' to train. Outside training every kernel will do."
        )


def of_keys(rows: Rows, past: int) -> Tensor | None:
    """[B, past + R] what the soft masks add to the logits of each key; None without any."""
    return None if rows.soft is None else pad(rows.soft.detach(), (past, 0))


def on(mask: Any, rows: Rows, past: int, hidden: Tensor, causal: bool) -> Tensor:
    """A layer's mask with the soft masks on it: [B, 1, R, C], of the type of `hidden`.

    Args:
        mask: what the kernel would be given: None, bool (what may be seen) or additive.
        rows: of the layer.
        past: keys of earlier turns.
        hidden: [B, R, d].
        causal: whether None stands for a causal mask.

    Raises:
        UnsupportedInputError: for a mask of another kind.
    """
    assert rows.soft is not None  # the caller has seen to it
    if mask is None:
        length = hidden.shape[1]
        mask = torch.ones(1, 1, length, past + length, dtype=torch.bool, device=hidden.device)
        mask = mask.tril(past) if causal else mask
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise UnsupportedInputError(
            f"Soft masks need a [batch, 1, rows, keys] mask to lie on, and this layer is given "
            f"{type(mask).__name__}; load the model with attn_implementation='sdpa' to train."
        )
    beyond = mask.shape[-1] - past - rows.soft.shape[1]
    added = pad(rows.soft, (past, beyond))[:, None, None].to(hidden.device, hidden.dtype)
    if mask.dtype == torch.bool:
        least = max(torch.finfo(hidden.dtype).min, _HIDDEN)
        return torch.where(mask, added, least)
    hides = mask <= torch.finfo(mask.dtype).min / 2
    return torch.where(hides, mask, mask + added).to(hidden.dtype)
