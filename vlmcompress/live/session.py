"""One pass through the tower: what hooks may see and leave while it runs.

Hooks are registered once per patched model and look for the session of *this* thread's pass in a
context variable; outside a pass they do nothing. No state stays on modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlmcompress.families.towers import Tower
from vlmcompress.live.timing import Stopwatch
from vlmcompress.live.towerrun import TowerRun


@dataclass
class Session:
    """The state of one tower pass.

    Attributes:
        tower: how to read the tower, or None when nothing is read.
        cls_layers: layers whose [CLS] row is wanted.
        received_layers: layers whose mean attention received is wanted.
        key_layers: layers whose keys are wanted.
        skip_after: blocks beyond this index are skipped; None skips none.
        select: called with the connector's input, returns the rows that go on; None leaves it
            alone.
        watch: the stage clock.
        projections: outputs of q and k projections not used yet.
        cls_rows: {layer: [b, heads, n] or per-image list} captured.
        received_rows: the same for attention received.
        keys: {layer: [b, n, heads, head_dim]}.
        wide_layers: layers whose [CLS] row over all heads as one is wanted.
        wide_rows: {layer: [b, 1, n] or per-image list} captured.
        state_layers: layers whose [CLS] output is wanted.
        cls_states: {layer: [b, d]} captured.
        level_layers: layers whose outputs are wanted.
        levels: {layer: [b, n, d]} captured, [CLS] among them.
        norm_layer: the layer whose output's length is wanted, if any.
        norms: [b, n] captured, [CLS] among them.
        connector_input: [b, n, d] what the connector was about to read, where text is wanted.
        run: the stage inside the tower, if there is one.
        replaced: [b, k, d_llm] what goes on in place of the connector's output, if anything does.
    """

    watch: Stopwatch
    tower: Tower | None = None
    cls_layers: frozenset[int] = frozenset()
    received_layers: frozenset[int] = frozenset()
    key_layers: frozenset[int] = frozenset()
    skip_after: int | None = None
    select: Callable[[Tensor], Tensor] | None = None
    projections: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    cls_rows: dict[int, list[Tensor]] = field(default_factory=dict)
    received_rows: dict[int, list[Tensor]] = field(default_factory=dict)
    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    wide_layers: frozenset[int] = frozenset()
    wide_rows: dict[int, list[Tensor]] = field(default_factory=dict)
    state_layers: tuple[int, ...] = ()
    cls_states: dict[int, Tensor] = field(default_factory=dict)
    level_layers: frozenset[int] = frozenset()
    levels: dict[int, Tensor] = field(default_factory=dict)
    norm_layer: int | None = None
    norms: Tensor | None = None
    connector_input: Tensor | None = None
    run: TowerRun | None = None
    replaced: Tensor | None = None

    @property
    def reduced(self) -> TowerRun | None:
        """The stage inside the tower, if fewer patches left it than came in."""
        return self.run if self.run is not None and self.run.reduced else None

    @property
    def acted(self) -> TowerRun | None:
        """The same, also if all of them left it and only some blocks saw fewer."""
        return self.run if self.run is not None and self.run.acted else None

    @property
    def idle(self) -> bool:
        """Whether no block's attention runs right now that evidence could be read from."""
        return self.run is not None and self.run.idle

    def reads(self, layer: int) -> bool:
        """Whether anything is wanted from `layer`."""
        if self.run is not None and self.run.reads(layer):
            return True
        wanted = (self.cls_layers, self.received_layers, self.key_layers, self.wide_layers)
        return any(layer in layers for layers in wanted)


_CURRENT: ContextVar[Session | None] = ContextVar("vlmcompress_session", default=None)


def current() -> Session | None:
    """The session of the pass that runs in this thread, if any."""
    return _CURRENT.get()


@contextmanager
def running(session: Session) -> Iterator[Session]:
    """Make `session` current for the tower pass inside."""
    token: Any = _CURRENT.set(session)
    try:
        yield session
    finally:
        _CURRENT.reset(token)
