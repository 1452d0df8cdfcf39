"""Layers that some rows pass by: these wait outside and come back in their places."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmcompress.live.rows import Rows, take_rows
from vlmcompress.methods.decoder.base import DecoderState, Reduction
from vlmcompress.methods.decoder.routing import LayerRouter, Route
from vlmcompress.methods.pipeline import LayerStage


class Routes:
    """What a router does in one forward."""

    def __init__(self, stage: LayerStage, depth: int) -> None:
        assert isinstance(stage.method, LayerRouter)  # the caller has chosen it for that
        self._router, self.parts, self._keep = stage.method, stage.parts, stage.keep
        self._layers = frozenset(stage.method.routed_layers(depth))

    def acts(self, layer: int) -> bool:
        """Whether rows may pass by a layer."""
        return layer in self._layers

    def route(self, layer: int, state: DecoderState) -> Route:
        """Which rows a layer works on."""
        if self.parts is not None:
            self.parts.follow(state.hidden.device)
        return self._router.route(layer, state, self._keep)


def parted(rows: Rows, route: Route) -> tuple[Rows, Tensor]:
    """The rows that a layer works on, in their order, and [B, R'] which of `rows` each one is."""
    found = rows.reduced(Reduction(route.keep), "original")
    if found is not None:
        return found
    return rows, torch.arange(rows.index.shape[1], device=rows.index.device).expand_as(rows.index)


def joined(hidden: Tensor, output: Tensor, rows: Rows, chosen: Tensor, weight: Tensor) -> Tensor:
    """All rows behind a layer that has worked on some of them.

    Args:
        hidden: [B, R, d] all of them before the layer.
        output: [B, R', d] what came out of it.
        rows: [B, R'] those it worked on.
        chosen: [B, R'] which of all each of these is.
        weight: [B, R] what the layer added to visual rows is multiplied by this.
    """
    before = take_rows(hidden, chosen)
    added = (output - before).float() * weight.gather(1, chosen)[..., None]
    weighed = (before + added).to(output.dtype)
    new = torch.where(rows.visual[..., None].to(output.device), weighed, output)
    length = hidden.shape[1]
    target = torch.where(rows.valid, chosen, length).to(hidden.device)  # padding goes beyond
    wide = torch.cat([hidden, hidden[:, :1]], 1)
    return wide.scatter(1, target[..., None].expand_as(new), new)[:, :-1]
