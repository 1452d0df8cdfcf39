"""What lets a tower's blocks run in halves, and its attention weigh keys.

All of it does nothing outside a pass whose pipeline has a stage inside the tower.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmcompress.families.towers import INPUT, Tower
from vlmcompress.live.session import current
from vlmcompress.live.sparserun import SparseRun
from vlmcompress.live.tower import own_forward, put_forward, take_forward
from vlmcompress.live.towerrun import TowerRun


def _attention_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run = _run()
    if run is None:
        return own_forward(self, *args, **kwargs)
    given = args[0] if args else kwargs["hidden_states"]
    if isinstance(run, SparseRun) and run.sparsifies:
        return run.attention(self, given, kwargs)
    if run.reduced and not run.idle:
        args, kwargs = run.weighed(args, kwargs, given.dtype)
    return run.halves.attention(partial(own_forward, self), args, kwargs)


def _mlp_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run = _run()
    if run is not None and run.halves.which == "attention":
        return run.halves.nothing(args[0])
    return own_forward(self, *args, **kwargs)


def _before_second_norm(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    run = _run()
    if run is None or run.halves.which != "attention":
        return None
    return (run.halves.hold(args[0]), *args[1:])


def _on_values(layer: int, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    session = current()
    if session is not None and session.run is not None and session.run.reads_values(layer):
        session.projections[layer, name] = output.detach()


def _run() -> TowerRun | None:
    session = current()
    return None if session is None else session.run


class ReductionHooks:
    """The forwards and hooks on the parts of one tower's blocks."""

    def __init__(self, tower: Tower, layers: nn.ModuleList) -> None:
        self._tower, self._layers = tower, layers
        self._handles: list[RemovableHandle] = []
        for index, layer in enumerate(layers):
            assert tower.norm is not None  # checked when the method was chosen
            norm = layer.get_submodule(tower.norm)
            attention = layer.get_submodule(tower.attention)
            self._handles.append(norm.register_forward_pre_hook(_before_second_norm))
            put_forward(attention, _attention_forward)
            put_forward(layer.get_submodule(tower.mlp), _mlp_forward)
            if tower.values in (INPUT, *tower.projections):
                continue  # it is read with queries and keys
            hook = partial(_on_values, index, tower.values)
            values = attention.get_submodule(tower.values)
            self._handles.append(values.register_forward_hook(hook))

    def remove(self) -> None:
        """Take everything off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            take_forward(layer.get_submodule(self._tower.attention), _attention_forward)
            take_forward(layer.get_submodule(self._tower.mlp), _mlp_forward)
