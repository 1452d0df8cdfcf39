"""One pass of a tower whose tokens are reduced between its blocks.

Many methods act between a block's attention and its MLP, where blocks run in halves. No step is
computed twice but the first norm, and none is rewritten here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.core.tokens import follow
from vlmcompress.families.towers import QueriesKeys, Tower
from vlmcompress.live.halves import Halves
from vlmcompress.methods.ops.merging import group_mean, group_sum
from vlmcompress.methods.pipeline import TowerStage
from vlmcompress.methods.stages import NAN_REMEDY
from vlmcompress.methods.tower.base import TowerAttention, TowerState


class TowerRun:
    """The state of one pass.

    Registers are rows that a method never sees: they are set aside before it runs and come back
    after it, while its view of the attention counts them among the keys.

    Args:
        stage: the method and its budget.
        tower: facts about the tower.
        depth: its layers.
        last: the last one whose output is read.
        in_order: whether rows leave that one in the order of their places.

    Attributes:
        halves: of a block that runs in two.
    """

    def __init__(
        self, stage: TowerStage, tower: Tower, depth: int, last: int, *, in_order: bool = False
    ) -> None:
        self._method, self._keep, self._tower = stage.method, stage.keep, tower
        self._parts = stage.parts
        self._cls_rows, self._depth, self._last = int(tower.has_cls), depth, last
        self._in_order = in_order
        self._plan: tuple[int, ...] = ()
        self._state: TowerState | None = None
        self._layer = -1
        self._seen: dict[int, TowerState] = {}
        self._came_out: dict[int, TowerState] = {}
        self._looks_ahead = False
        self.halves = Halves(tower.rows)

    @property
    def state(self) -> TowerState:
        """The tokens so far."""
        assert self._state is not None  # the first block has run
        return self._state

    @property
    def began(self) -> bool:
        """Whether a block has run."""
        return self._state is not None

    @property
    def reduced(self) -> bool:
        """Whether fewer patches left the tower than came in."""
        return self.began and self.state.patches < self.n_full

    @property
    def acted(self) -> bool:
        """Whether any block saw fewer patches than came in, also where all left the tower."""
        return self.began and any(left < self.n_full for left in self._plan)

    @property
    def n_full(self) -> int:
        """Patches that came in."""
        return self.state.assignment.shape[1]

    @property
    def plan(self) -> tuple[int, ...]:
        """Patches left after each layer."""
        return self._plan

    @property
    def keys(self) -> tuple[int, ...]:
        """Keys that a query looks at in each layer; empty where it looks at all."""
        return ()

    @property
    def idle(self) -> bool:
        """Whether no block's attention runs right now that evidence could be read from."""
        return self._looks_ahead or self.halves.which == "mlp"

    @property
    def ran(self) -> int | None:
        """Blocks that were run; None where all are."""
        return None

    def reads(self, layer: int) -> bool:
        """Whether the method looks at the attention of `layer`."""
        return bool(self._method.reads) and self._acts(layer)

    def reads_values(self, layer: int) -> bool:
        """Whether it looks at its values."""
        return "values" in self._method.reads and self._acts(layer)

    def _acts(self, layer: int) -> bool:
        return layer < len(self._plan) and self._plan[layer] < self.state.patches

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """Rows in the attention and in the MLP of each layer up to the last that is read."""
        others = self._cls_rows + self._tower.registers
        left = [self.n_full, *(self._plan or [self.n_full] * (self._last + 1))]
        attention = left[1:] if self._method.place == "before" else left[:-1]
        mlp = left[:-1] if self._method.place == "after" else left[1:]
        return tuple((a + others, m + others) for a, m in zip(attention, mlp, strict=True))

    def mass(self) -> Tensor:
        """[b, n] patches that each row stands for; 1 for those that are none, registers too."""
        mass = self.state.mass
        return self._with_registers(mass, mass.new_ones(len(mass), self._tower.registers))

    def bias(self) -> Tensor | None:
        """[b, n] log of the mass, where keys are weighed by it and there is any to tell."""
        if not self._method.weighs_keys or not self.reduced:
            return None
        return self.mass().log()

    def weighed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of an attention call with that bias."""
        bias = self.bias()
        return self._tower.weighed(args, kwargs, None if bias is None else bias.to(dtype))

    def block(
        self, layer: int, module: nn.Module, forward: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> Tensor:
        """The output of a block, its rows reduced where the method acts in it.

        Args:
            layer: index of the block.
            module: the block.
            forward: its own.
            hidden: [b, n, d], or as the tower has it.
        """
        rows = self._tower.rows
        output = self._block(layer, module, lambda x: rows(forward(rows(x))), rows(hidden))
        if self._in_order and layer == self._last and self.reduced:
            if bool(output.isnan().any()):
                raise UnsupportedInputError(
                    f"The states of the vision tower hold NaN. {NAN_REMEDY}"
                )
            output = self._sorted(output)
        self._came_out[layer] = _without_rows(self.state)
        return rows(output)

    def _block(
        self, layer: int, module: nn.Module, forward: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> Tensor:
        if self._state is None:
            self._begin(hidden)
        self._layer = layer
        if not self._acts(layer):
            return self._given_back(layer, forward(hidden))
        place, k = self._method.place, self._plan[layer]
        if place == "before":
            if self.reads(layer):
                self._look_ahead(module, hidden)
            return forward(self._reduce(hidden, k))
        if place == "after":
            return self._reduce(forward(hidden), k)
        return self.halves.run(forward, hidden, lambda between: self._reduce(between, k))

    def _given_back(self, layer: int, hidden: Tensor) -> Tensor:
        """A block's output, its patches made again where the plan rises."""
        if layer >= len(self._plan) or self._plan[layer] <= self.state.patches:
            return hidden
        whole = dataclasses.replace(self.state, hidden=self._shown(hidden, 1)).restored()
        self._state = _without_rows(whole)
        c, r = self._cls_rows, self._tower.registers
        return self._with_registers(whole.hidden, hidden[:, c : c + r])

    @torch.no_grad()
    def _look_ahead(self, module: nn.Module, hidden: Tensor) -> None:
        """Queries and keys that a block is about to make, from its own norm and projections."""
        self._looks_ahead = True
        tower = self._tower
        attention = module.get_submodule(tower.attention)
        normed = module.get_submodule(tower.first_norm)(tower.rows(hidden))
        qk = tower.queries_keys(attention, tower.projected(attention, normed), {})
        self._looks_ahead = False
        self._view(qk, None)

    def _view(self, qk: QueriesKeys, values: Tensor | None) -> None:
        """Show the method a block's attention, registers as keys only."""
        c, r = self._cls_rows, self._tower.registers
        bias = self.bias()
        attention = TowerAttention(
            self._shown(qk.q, 2),
            self._shown(qk.k, 2),
            qk.scale,
            None if values is None else self._shown(values, 2),
            None if bias is None else self._shown(bias, 1),
            qk.k[:, :, c : c + r] if r else None,
        )
        self._state = dataclasses.replace(self.state, attention=attention)

    def _shown(self, x: Tensor, dim: int) -> Tensor:
        """Rows without registers."""
        c, r = self._cls_rows, self._tower.registers
        if r == 0:
            return x
        first, _, patches = x.split([c, r, x.shape[dim] - c - r], dim)
        return torch.cat([first, patches], dim)

    def _with_registers(self, shown: Tensor, registers: Tensor) -> Tensor:
        """Rows ([b, n, ...]) with registers ([b, r, ...]) in their place."""
        if self._tower.registers == 0:
            return shown
        c = self._cls_rows
        return torch.cat([shown[:, :c], registers, shown[:, c:]], 1)

    def _begin(self, hidden: Tensor) -> None:
        self._state = TowerState.whole(self._shown(hidden, 1), self._cls_rows, self._depth)
        if self._parts is not None:
            self._parts.follow(hidden.device)
        n = self.state.patches
        if self._keep is not None and self._method.tokens_kept(n, self._keep) >= n:
            return
        self._plan = self._method.schedule(n, self._keep, self._depth, self._last)

    def _reduce(self, hidden: Tensor, k: int) -> Tensor:
        state = dataclasses.replace(self.state, hidden=self._shown(hidden, 1), parts=self._parts)
        short = self._method.reduce(self._layer, state, k)
        self._state = _without_rows(short)
        c, r = self._cls_rows, self._tower.registers
        return self._with_registers(short.hidden, hidden[:, c : c + r])

    def _sorted(self, hidden: Tensor) -> Tensor:
        """Rows that leave the tower ([b, n, d]) in the order of their places, and the state too."""
        c, r, state = self._cls_rows, self._tower.registers, self.state
        first = torch.arange(c, device=hidden.device).expand(len(hidden), -1)
        rows = torch.cat([first, self.order() + c], 1)
        self._state = dataclasses.replace(
            state,
            mass=state.mass.gather(1, rows),
            source=state.source.gather(1, rows),
            assignment=follow(state.assignment, rows.argsort(1)),
        )
        shown = torch.take_along_dim(self._shown(hidden, 1), rows[..., None], 1)
        return self._with_registers(shown, hidden[:, c : c + r])

    def saw(self, layer: int, qk: QueriesKeys, values: Tensor | None) -> QueriesKeys:
        """A block's queries and keys, for the method and for later evidence."""
        if self.reads(layer):
            self._view(qk, values)
        self._seen[layer] = _without_rows(self.state)
        return dataclasses.replace(qk, bias=self.bias())

    def order(self) -> Tensor:
        """[b, k] final patch rows in the order of their places in the image."""
        return self.state.source[:, self._cls_rows :].argsort(1)

    def source(self) -> Tensor:
        """[b, k] patch that represents each row, in the order of places."""
        return self.state.source[:, self._cls_rows :].sort(1).values

    def assignment(self) -> Tensor:
        """[b, n_full] row each patch went to, -1 where dropped, rows in the order of places."""
        number = self.order().argsort(1)
        row = self.state.assignment - self._cls_rows
        return torch.where(row < 0, -1, number.gather(1, row.clamp(min=0)))

    def followed(
        self, layer: int, values: Tensor, how: Literal["sum", "mean"], *, behind: bool = False
    ) -> Tensor:
        """Evidence of `layer` ([b, heads, n_layer], patches only) as that of the final rows.

        Args:
            layer: that was seen.
            values: of the rows that its attention saw, or of those that left it (`behind`).
            how: values of rows that were joined since are joined.
            behind: see `values`.
        """
        seen = (self._came_out if behind else self._seen)[layer]
        if not self.reduced:
            return _spread(seen, values, how)
        source = seen.source[:, self._cls_rows :]
        moved = self.assignment().gather(1, source)
        fold = group_sum if how == "sum" else group_mean
        flat = values.flatten(1, -2).transpose(1, 2)
        folded = fold(flat, moved, self.state.patches).transpose(1, 2)
        return folded.unflatten(1, values.shape[1:-1]).to(values.dtype)


def _spread(seen: TowerState, values: Tensor, how: Literal["sum", "mean"]) -> Tensor:
    """Evidence of rows ([b, ..., n_layer]) as that of all patches: [b, ..., n_full].

    A sum over a row's patches is shared among them, a mean is that of each; what was dropped has 0.
    """
    row = seen.assignment - seen.cls_rows
    shape = (len(row), *[1] * (values.ndim - 2), -1)
    if how == "sum":
        values = values / seen.mass[:, seen.cls_rows :].view(shape)
    spread = torch.take_along_dim(values, row.clamp(min=0).view(shape), -1)
    return spread * (row >= 0).view(shape)


def _without_rows(state: TowerState) -> TowerState:
    """What is remembered of a state; its rows are the next block's, and would be kept alive."""
    return dataclasses.replace(state, hidden=state.hidden[:, :0].detach(), attention=None)
