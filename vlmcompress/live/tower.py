"""Tower blocks whose output nobody reads are skipped; rows are selected before the connector.

LLaVA reads hidden state -2, so its last block runs for nothing. Blocks stay in their ModuleList
(the state dict keeps its keys): their instance-level forward hands its input on while a compressed
pass runs and is the class's own otherwise, so that a caller who asks for the tower's outputs gets
them.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmcompress.live.session import current

#: Where a forward that was set on the instance before (accelerate does that) is kept.
_PREVIOUS = "_vlmcompress_forward"
_INDEX = "_vlmcompress_index"


def _skippable_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    session = current()
    if (
        session is not None
        and session.skip_after is not None
        and self.__dict__[_INDEX] > session.skip_after
    ):
        return hidden_states
    previous: Callable[..., Any] | None = self.__dict__.get(_PREVIOUS)
    if previous is not None:
        output = previous(hidden_states, *args, **kwargs)
    else:
        output = type(self).forward(self, hidden_states, *args, **kwargs)
    if session is not None and self.__dict__[_INDEX] in session.state_layers:
        session.cls_states[self.__dict__[_INDEX]] = output[:, 0]
    return output


def make_skippable(layers: nn.ModuleList) -> None:
    """Give every block the forward above."""
    for index, layer in enumerate(layers):
        if "forward" in layer.__dict__:
            layer.__dict__[_PREVIOUS] = layer.__dict__["forward"]
        layer.__dict__[_INDEX] = index
        layer.__dict__["forward"] = types.MethodType(_skippable_forward, layer)


def undo_skippable(layers: nn.ModuleList) -> None:
    """Inverse of `make_skippable`.

    A forward that somebody else has wrapped since is left to them: it still calls ours, which then
    does what the class does.
    """
    for layer in layers:
        if getattr(layer.__dict__.get("forward"), "__func__", None) is not _skippable_forward:
            continue
        del layer.__dict__[_INDEX], layer.__dict__["forward"]
        if _PREVIOUS in layer.__dict__:
            layer.__dict__["forward"] = layer.__dict__.pop(_PREVIOUS)


def may_skip(layers: nn.ModuleList) -> bool:
    """Whether skipping is safe: a checkpointed block is run again in backward, outside the pass."""
    return not any(
        getattr(layer, "gradient_checkpointing", False) and layer.training for layer in layers
    )


def _before_connector(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    session = current()
    if session is None or session.select is None:
        return None
    # Once per pass: Ovis2 calls its embedding table a second time for the indicator tokens.
    select, session.select = session.select, None
    return (select(args[0]), *args[1:])


def hook_connector(connector: nn.Module) -> RemovableHandle:
    """Let the pass's selection thin out what the connector reads."""
    return connector.register_forward_pre_hook(_before_connector)
