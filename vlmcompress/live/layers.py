"""What lets the layers of a language model work on fewer rows, or in halves.

All of it does nothing outside a call whose pipeline acts inside the language model, or whose cache
was cut there. The run of *this* thread's call is found in a context variable, and a layer asks it
only if it belongs to the same model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmcompress.families.decoders import Decoder
from vlmcompress.live.compiled import Untraced
from vlmcompress.live.kernels import unwatch, watch
from vlmcompress.live.layerrun import LayerRun
from vlmcompress.live.tower import own_forward, put_forward, take_forward

_CURRENT: ContextVar[LayerRun | None] = ContextVar("vlmcompress_layers", default=None)
#: Projections that need not see every row when only a layer's queries and keys are wanted.
_LEAN = ("q_proj", "v_proj", "o_proj")


def begin(run: LayerRun | None) -> None:
    """Make `run` that of this thread's call; None for calls that nothing is done in."""
    _CURRENT.set(run)


@contextmanager
def apart() -> Iterator[None]:
    """Inside, the language model runs as if nothing acted in it."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def onlooker(attention: nn.Module) -> Callable[..., Any] | None:
    """Who looks at the kernel of a layer's attention right now."""
    run = _CURRENT.get()
    return run.attention if run is not None and run.owns(attention) else None


def _run_of(layer: nn.Module) -> LayerRun | None:
    run = _CURRENT.get()
    return run if run is not None and run.owns(layer) else None


def _layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    run = _run_of(self)
    if run is None:
        return own_forward(self, hidden_states, *args, **kwargs)

    def forward(hidden: Tensor, whole: bool = True, **arguments: Any) -> Any:
        if not whole and self.training and getattr(self, "gradient_checkpointing", False):
            # Backward would repeat the layer as the model has it, and neither its halves nor what
            # is edited in it: these are not checkpointed.
            return inspect.unwrap(type(self).forward)(self, hidden, *args, **arguments)
        return own_forward(self, hidden, *args, **arguments)

    return run.block(self, forward, hidden_states, kwargs)


def _attention_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run = _run_of(self)
    if run is None:
        return own_forward(self, *args, **kwargs)
    return run.halves.attention(partial(own_forward, self), args, kwargs)


def _mlp_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run = _run_of(self)
    if run is not None and run.halves.which == "attention":
        return run.halves.nothing(args[0])
    return own_forward(self, *args, **kwargs)


def _before_norm(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    run = _run_of(module)
    if run is None or run.halves.which != "attention":
        return None
    return (run.halves.hold(args[0]), *args[1:])


def _before_projection(name: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
    run = _run_of(module)
    if run is None or not run.look.ahead:
        return None
    return (run.look.lean_input(name, args[0]), *args[1:])


def _after_projection(name: str, module: nn.Module, args: Any, output: Tensor) -> Any:
    run = _run_of(module)
    if run is None or not run.look.ahead:
        return None
    return run.lean_output(name, output)


def _after_decoder(module: nn.Module, args: Any, output: Any) -> Any:
    run = _CURRENT.get()
    if run is None or run.decoder.module is not module:
        return None
    # What is done to the layers from here on is none of this call's business.
    begin(None)
    if isinstance(output, tuple):
        return (run.finish(output[0]), *output[1:])
    output.last_hidden_state = run.finish(output.last_hidden_state)
    return output


def _after_model(module: nn.Module, args: Any, output: Any) -> None:
    """Also after a forward that has failed: its run must not meet the next use of the layers."""
    begin(None)


class LayerHooks:
    """The forwards and hooks on one language model.

    Attributes:
        parts: layers and what in them is hooked, with the number of the layer.
    """

    def __init__(self, model: nn.Module, decoder: Decoder) -> None:
        self._decoder = decoder
        self.parts: dict[nn.Module, int] = {}
        self._projections: dict[tuple[int, str], tuple[nn.Module, list[RemovableHandle]]] = {}
        self._handles: list[RemovableHandle] = [
            decoder.module.register_forward_hook(_after_decoder),
            model.register_forward_hook(Untraced(_after_model), always_call=True),
        ]
        for index, layer in enumerate(decoder.layers):
            attention, mlp = (layer.get_submodule(n) for n in (decoder.attention, decoder.mlp))
            put_forward(layer, _layer_forward)
            put_forward(attention, _attention_forward)
            put_forward(mlp, _mlp_forward)
            self.parts.update(dict.fromkeys((layer, attention, mlp), index))
            if decoder.between is not None:
                norm = layer.get_submodule(decoder.between)
                self._handles.append(norm.register_forward_pre_hook(_before_norm))
                self.parts[norm] = index
        self.refresh()

    @property
    def decoder(self) -> Decoder:
        """The language model."""
        return self._decoder

    def refresh(self) -> None:
        """Follow a change of kernel since, and projections replaced since, as PEFT does."""
        for index, layer in enumerate(self._decoder.layers):
            attention = layer.get_submodule(self._decoder.attention)
            watch(attention)
            if all(hasattr(attention, name) for name in _LEAN):
                for name in _LEAN:
                    self._follow((index, name), attention.get_submodule(name))

    def _follow(self, key: tuple[int, str], projection: nn.Module) -> None:
        known, handles = self._projections.get(key, (None, []))
        if known is projection:
            return
        for handle in handles:
            handle.remove()
        before, after = partial(_before_projection, key[1]), partial(_after_projection, key[1])
        handles = [
            projection.register_forward_pre_hook(before),
            projection.register_forward_hook(after),
        ]
        self._projections[key] = (projection, handles)
        self.parts[projection] = key[0]

    def remove(self) -> None:
        """Take everything off."""
        for handle in [*self._handles, *(h for _, hs in self._projections.values() for h in hs)]:
            handle.remove()
        self._handles.clear()
        self._projections.clear()
        decoder = self._decoder
        for layer in decoder.layers:
            take_forward(layer, _layer_forward)
            attention = layer.get_submodule(decoder.attention)
            take_forward(attention, _attention_forward)
            take_forward(layer.get_submodule(decoder.mlp), _mlp_forward)
            unwatch(attention)
