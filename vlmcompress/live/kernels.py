"""Looking over the shoulder of a decoder layer's attention kernel, whichever it is.

A layer gets a copy of its configuration that names an attention function of ours. It is called with
queries and keys as the kernel gets them (normed, rotated, those of the cache included), and hands
on to the kernel that the model was loaded with. The name keeps the kernel's in it, since
transformers tests names for it, and the kernel sees the module with its own configuration.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import Tensor, nn

_PREFIX = "vlmcompress_"
_OWN = "_vlmcompress_own"


class _Before:
    """A module as it was before its configuration was replaced."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.__dict__.update(_module=module, config=config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _call(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """The attention function under our names."""
    from vlmcompress.live.layers import onlooker

    look = onlooker(module)
    if look is not None:
        answer = look(module, query, key, value, attention_mask, kwargs)
        if answer is not None:
            return answer
    return call_kernel(module, query, key, value, attention_mask, **kwargs)


def call_kernel(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """The kernel that the model was loaded with: (output, weights)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = module.config.__dict__[_OWN]
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(own._attn_implementation, eager)
    return function(_Before(module, own), query, key, value, attention_mask, **kwargs)


def _registered(kernel: str) -> str:
    # Here, since `import transformers` leaves these for later.
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _PREFIX + kernel
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _call)
        if kernel in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    return name


def watch(attention: nn.Module) -> None:
    """Let an attention module's kernel be looked at; also after the model's kernel has changed."""
    current: Any = attention.config
    own = current.__dict__.get(_OWN, current)
    name = _registered(own._attn_implementation)
    if current is own:
        current = copy.copy(own)
        current.__dict__[_OWN] = own
        attention.config = current
    if current._attn_implementation != name:
        current._attn_implementation_internal = name


def unwatch(attention: nn.Module) -> None:
    """Inverse of `watch`."""
    own = attention.config.__dict__.get(_OWN)  # type: ignore[union-attr]
    if own is not None:
        attention.config = own
