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

from vlmcompress.live.session import Session, current

#: Where a forward that was set on the instance before (accelerate does that) is kept.
_PREVIOUS = "_vlmcompress_forward"
_INDEX = "_vlmcompress_index"


def own_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module did before: a forward set on the instance, or its class's."""
    previous: Callable[..., Any] | None = self.__dict__.get(_PREVIOUS)
    if previous is not None:
        return previous(*args, **kwargs)
    return type(self).forward(self, *args, **kwargs)


def _skippable_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    session = current()
    if (
        session is not None
        and session.skip_after is not None
        and self.__dict__[_INDEX] > session.skip_after
    ):
        return hidden_states

    def forward(hidden: Tensor) -> Any:
        return own_forward(self, hidden, *args, **kwargs)

    if session is None or session.run is None:
        output = forward(hidden_states)
    else:
        output = session.run.block(self.__dict__[_INDEX], self, forward, hidden_states)
    if session is not None:
        _remember(session, self.__dict__[_INDEX], output)
    return output


def _remember(session: Session, layer: int, output: Any) -> None:
    """What is wanted of a block's output."""
    states = output if isinstance(output, Tensor) else output[0]
    if layer in session.state_layers:
        session.cls_states[layer] = states[:, 0]
    if layer in session.level_layers:
        session.levels[layer] = states
    if layer == session.norm_layer:
        session.norms = states.detach().float().norm(dim=-1)


def make_skippable(layers: nn.ModuleList) -> None:
    """Give every block the forward above."""
    for index, layer in enumerate(layers):
        layer.__dict__[_INDEX] = index
        put_forward(layer, _skippable_forward)


def is_skippable(layer: nn.Module) -> bool:
    """Whether a block has that forward."""
    return _INDEX in layer.__dict__


def undo_skippable(layers: nn.ModuleList) -> None:
    """Inverse of `make_skippable`.

    A forward that somebody else has wrapped since is left to them: it still calls ours, which then
    does what the class does.
    """
    for layer in layers:
        if take_forward(layer, _skippable_forward):
            del layer.__dict__[_INDEX]


def put_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Set an instance-level forward, which finds the one before by `own_forward`."""
    if "forward" in module.__dict__:
        module.__dict__[_PREVIOUS] = module.__dict__["forward"]
    module.__dict__["forward"] = types.MethodType(forward, module)


def take_forward(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Inverse of `put_forward`; whether ours was still in its place."""
    if getattr(module.__dict__.get("forward"), "__func__", None) is not forward:
        return False
    del module.__dict__["forward"]
    if _PREVIOUS in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop(_PREVIOUS)
    return True


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


def _after_connector(module: nn.Module, args: Any, output: Any) -> Tensor | None:
    session = current()
    if session is None or session.replaced is None:
        return None
    replaced, session.replaced = session.replaced, None
    return replaced


def hook_connector(connector: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """Let the pass's selection thin out what the connector reads, or take the connector's place."""
    return (
        connector.register_forward_pre_hook(_before_connector),
        connector.register_forward_hook(_after_connector),
    )
