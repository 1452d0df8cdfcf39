"""Methods inside the language model that drop nothing, as one forward meets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlmcompress.core.errors import ConfigError, UnsupportedInputError
from vlmcompress.families.decoders import Decoder
from vlmcompress.live.columns import Columns
from vlmcompress.live.editing import Edits
from vlmcompress.live.exiting import Exits, refuse_training
from vlmcompress.live.routing import Routes
from vlmcompress.live.rows import LayerRecord, Rows
from vlmcompress.methods.decoder.base import LayerReducer
from vlmcompress.methods.decoder.editing import AttentionEditor
from vlmcompress.methods.decoder.exiting import LayerExit
from vlmcompress.methods.decoder.routing import LayerRouter
from vlmcompress.methods.pipeline import LayerStage, Pipeline

#: Visual tokens that budgets are tried on.
EXAMPLE = 576


class Beside:
    """An editor, a router and an early exit, as far as there are any.

    Attributes:
        edits: what is done to attention.
        routes: which rows pass by layers.
        exits: when the rows leave.
        standing: stages that go on in later forwards over the same cache.
    """

    def __init__(
        self,
        stages: Sequence[LayerStage],
        decoder: Decoder,
        columns: Columns,
        past: LayerRecord | None,
        log: list[int] | None,
    ) -> None:
        """Begin a forward.

        Args:
            stages: of the call, or those that its cache stands under.
            decoder: the language model.
            columns: of the call.
            past: what the cache knows.
            log: layers that earlier forwards have run.
        """
        self._depth = depth = len(decoder.layers)
        self.edits: Edits | None = None
        self.routes: Routes | None = None
        self.exits: Exits | None = None
        for stage in stages:
            method = stage.method
            if isinstance(method, AttentionEditor):
                self.edits = Edits(method, decoder, columns, past)
            elif isinstance(method, LayerExit):
                refuse_training(method.name, decoder.module.training)
                self.exits = Exits(method, depth, [] if log is None else log)
            elif isinstance(method, LayerRouter):
                self.routes = Routes(stage, depth)
        lasting = (AttentionEditor, LayerExit)
        self.standing = tuple(stage for stage in stages if isinstance(stage.method, lasting))

    @property
    def left(self) -> bool:
        """Whether all rows have left already."""
        return self.exits is not None and self.exits.left

    @property
    def skipped(self) -> int:
        """Layers that the rows have left out."""
        return self._depth - self.exits.log[-1] if self.exits is not None and self.left else 0

    def edits_at(self, layer: int) -> Edits | None:
        """What edits the attention of a layer, if anything does."""
        return self.edits if self.edits is not None and self.edits.acts(layer) else None

    def routes_at(self, layer: int) -> Routes | None:
        """What lets rows pass by a layer, if anything does."""
        return self.routes if self.routes is not None and self.routes.acts(layer) else None

    def enter(self, layer: int, rows: Rows, hidden: Tensor) -> None:
        """Take note of what comes into a layer's cache."""
        if self.edits is not None:
            self.edits.mark(layer, rows, hidden)

    def behind(self, layer: int, before: tuple[Tensor, Rows], after: tuple[Tensor, Rows]) -> None:
        """Look at the rows before and behind a layer."""
        if self.exits is not None:
            (hidden, rows), (output, left) = before, after
            self.exits.saw(layer, hidden, rows.last, output, left.last)

    def crop(self, layer: int, rows: Rows, chosen: Tensor) -> None:
        """Follow a cache that was cut to `rows`, which are `chosen` ([B, R]) of those it held.

        Raises:
            UnsupportedInputError: where a router let some of them pass by.
        """
        if self.routes is not None:
            raise UnsupportedInputError(
                "A method that cuts the caches of earlier layers cannot do so where a router let "
                "some rows pass by them; use crop=False, or one of the two methods."
            )
        if self.edits is not None:
            self.edits.crop(layer, rows, chosen)

    def memory(self) -> dict[str, Any]:
        """What a cache is to remember, by the names of `LayerRecord`."""
        marks = () if self.edits is None else self.edits.marks
        exits = [] if self.exits is None else self.exits.log
        return {"standing": self.standing, "marks": marks, "exits": exits}


def check_beside(built: Pipeline, decoder: Decoder) -> None:
    """Refuse what could only fail at the first prompt, or do nothing there.

    Raises:
        ConfigError: for layers that are not there, two methods of one kind, and methods that get
            in each other's way.
    """
    depth, width = len(decoder.layers), int(decoder.config.hidden_size)
    for kind in (AttentionEditor, LayerRouter, LayerExit):
        names = [stage.method.name for stage in built.decoder if isinstance(stage.method, kind)]
        if len(names) > 1:
            raise ConfigError(
                f"The pipeline names {' and '.join(map(repr, names))}, and one method that does "
                "such a thing inside the language model is all that can act; name it once."
            )
    for stage in built.decoder:
        method = stage.method
        if isinstance(method, AttentionEditor):
            method.edited_layers(depth, width)
        elif isinstance(method, LayerExit):
            method.check_depth(depth)
        elif isinstance(method, LayerRouter):
            method.processed(EXAMPLE, stage.keep)
            _check_routed(method, built, depth)


def _check_routed(router: LayerRouter, built: Pipeline, depth: int) -> None:
    """Refuse layers that cannot be passed by, and reducers that look at, or act in, such layers."""
    routed = frozenset(router.routed_layers(depth))
    if 0 in routed:
        raise ConfigError(
            f"{router.name} is to let tokens pass by layer 0 of {depth}, whose cache tells how "
            "long a conversation is; name layers from 1 on."
        )
    for stage in built.decoder:
        if not isinstance(stage.method, LayerReducer):
            continue
        previous = stage.method.reads == "previous"
        for site in stage.method.sites(depth):
            layer = site.layer - 1 if previous and site.where == "before" else site.layer
            if layer in routed and (previous or site.where == "between"):
                raise ConfigError(
                    f"{stage.method.name} looks at or acts in layer {layer}, which {router.name} "
                    "lets most visual tokens pass by; name other layers for one of the two."
                )
