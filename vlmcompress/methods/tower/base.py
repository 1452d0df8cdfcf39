"""The contract of methods inside the tower: `TowerReducer`, and the state it is handed.

A reducer sees tensors only. When a block's tokens are reduced, and to how many, is a schedule known
before any pixel: every image of a batch is cut to the same length at the same place.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError, EvidenceError
from vlmcompress.core.tokens import follow, joined_mass, moved_to
from vlmcompress.methods.base import Layer, Method, Stage
from vlmcompress.methods.learned import Learned, Parts, required
from vlmcompress.methods.options import resolve_layer
from vlmcompress.methods.tower.shape import TowerShape

Place: TypeAlias = Literal["before", "between", "after"]


@dataclass(frozen=True)
class TowerAttention:
    """What a block's attention is made of, for all rows including [CLS].

    Attributes:
        q: [b, heads, n, head_dim] queries.
        k: [b, heads, n, head_dim] keys.
        v: [b, heads, n, head_dim] values; None unless the method reads them.
        scale: factor on the logits.
        bias: [b, n] added to the logits of every key; None for none.
        registers: [b, heads, r, head_dim] keys of rows that are attended to, and that a method
            does not see; None for none.
    """

    q: Tensor
    k: Tensor
    scale: float
    v: Tensor | None = None
    bias: Tensor | None = None
    registers: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Keys averaged over heads: [b, n, head_dim] float32."""
        return self.k.float().mean(1)

    def weights(self, rows: slice = slice(None)) -> Tensor:
        """Softmax rows of some queries: [b, heads, rows, n] float32."""
        logits = self.q[:, :, rows].float() @ self.k.float().transpose(-1, -2) * self.scale
        if self.bias is not None:
            logits = logits + self.bias.float()[:, None, None]
        if self.registers is None:
            return logits.softmax(-1)
        more = self.q[:, :, rows].float() @ self.registers.float().transpose(-1, -2) * self.scale
        return torch.cat([logits, more], -1).softmax(-1)[..., : logits.shape[-1]]

    def received(self) -> Tensor:
        """Attention each row receives, averaged over heads and queries: [b, n] float32.

        Queries are taken in blocks, so that memory is O(n).
        """
        n = self.q.shape[2]
        blocks = (self.weights(slice(i, i + 64)).sum(2) for i in range(0, n, 64))
        return torch.stack(list(blocks)).sum(0).mean(1) / n


@dataclass(frozen=True)
class TowerState:
    """Tokens inside the tower.

    Attributes:
        hidden: [b, n, d], [CLS] first where the tower has one.
        mass: [b, n] float32, how many patches each row stands for; 1 for [CLS].
        source: [b, n] patch that represents each row; -1 for [CLS].
        assignment: [b, n_full] row each patch went to, -1 where dropped.
        cls_rows: how many leading rows are no patches.
        depth: layers of the tower.
        attention: of the block that runs; None unless the method reads it.
        recipe: [b, n_full, patches] float32, weights of the rows by which every patch is made again
            at the layer where the schedule says so; None where none will be.
        parts: what the method has learnt; None where it learns nothing.
    """

    hidden: Tensor
    mass: Tensor
    source: Tensor
    assignment: Tensor
    cls_rows: int
    depth: int
    attention: TowerAttention | None = None
    recipe: Tensor | None = None
    parts: Learned | None = None

    @classmethod
    def whole(cls, hidden: Tensor, cls_rows: int, depth: int) -> TowerState:
        """All patches, as the first block finds them ([b, cls_rows + n_full, d])."""
        b, n = hidden.shape[:2]
        rows = torch.arange(n, device=hidden.device).expand(b, n)
        source = (rows - cls_rows).clamp(min=-1)
        mass = torch.ones(b, n, device=hidden.device)
        return cls(hidden, mass, source, rows[:, cls_rows:], cls_rows, depth)

    @property
    def patches(self) -> int:
        """Rows that are patches."""
        return self.mass.shape[1] - self.cls_rows

    def attended(self) -> TowerAttention:
        """The block's attention.

        Raises:
            EvidenceError: when it was not read.
        """
        if self.attention is None:
            raise EvidenceError("A method in the tower needs a block's attention; none was read.")
        return self.attention

    def learnt(self, kind: type[Parts]) -> Parts:
        """What the method has learnt.

        Raises:
            EvidenceError: when the state has none of that kind.
        """
        return required(self.parts, kind, "tower")

    def select(self, rows: Tensor) -> TowerState:
        """Keep `rows` ([b, m], [CLS] among them) and drop the others."""
        moved = moved_to(rows, self.mass.shape[1])
        return self.regroup(torch.take_along_dim(self.hidden, rows[..., None], 1), rows, moved)

    def regroup(self, hidden: Tensor, rows: Tensor, moved: Tensor) -> TowerState:
        """New rows made of the current ones.

        Args:
            hidden: [b, m, d] of the new rows, [CLS] first.
            rows: [b, m] current row that represents each new one.
            moved: [b, n] new row that each current one became part of, -1 where dropped.
        """
        return dataclasses.replace(
            self,
            hidden=hidden.to(self.hidden.dtype),
            mass=joined_mass(self.mass, moved, rows.shape[1]),
            source=self.source.gather(1, rows),
            assignment=follow(self.assignment, moved),
            recipe=None,
        )

    def restored(self) -> TowerState:
        """All patches again, in their places, made of the rows by `recipe`.

        Raises:
            EvidenceError: without one.
        """
        if self.recipe is None:
            raise EvidenceError(
                "A schedule brings patches back that nothing says how to make again; the method "
                "must set TowerState.recipe when it reduces."
            )
        first, x = self.cls_rows, self.hidden
        with torch.autocast(x.device.type, enabled=False):
            rows = x[:, first:].to(self.recipe.dtype)
            # A product per image: an image's patches do not depend on its batch.
            made = torch.stack([w @ r for w, r in zip(self.recipe, rows, strict=True)])
        whole = self.whole(torch.cat([x[:, :first], made.to(x.dtype)], 1), first, self.depth)
        return dataclasses.replace(
            self,
            hidden=whole.hidden,
            mass=whole.mass,
            source=whole.source,
            assignment=whole.assignment,
            attention=None,
            recipe=None,
        )


class TowerReducer(Method):
    """Inside the tower: fewer tokens go on at some of its blocks.

    Class attributes:
        reads: what `reduce` is handed of the block beside its rows: any of `attention` (queries
            and keys) and `values`.
        looks_at: what decides, in a few words, for the table of methods.
        needs_cls: whether the tower must have a [CLS] token.
    """

    stage: ClassVar[Stage] = "tower"
    reads: ClassVar[frozenset[str]] = frozenset()
    looks_at: ClassVar[tuple[str, ...]] = ("features",)
    needs_cls: ClassVar[bool] = False

    @property
    def place(self) -> Place:
        """Where in a block: before its attention, between that and its MLP, or after it."""
        return "between"

    @property
    def weighs_keys(self) -> bool:
        """Whether later blocks add log(mass) to each key's logits (proportional attention)."""
        return False

    def tokens_kept(self, n: int, keep: float | int) -> int:
        """Patches left of `n`, known before any pixel is seen; the fewest, where they come back."""
        return keeping.count(keep, n)

    @abstractmethod
    def schedule(self, n: int, keep: float | int | None, depth: int, last: int) -> tuple[int, ...]:
        """Patches left after each layer from 0 to `last`.

        They may rise once more to `n`: after that block patches are made again of the rows, by the
        `recipe` that `reduce` has put into the state.

        Args:
            n: patches before.
            keep: what stays at the end, a fraction or a count; None with a budget of its own.
            depth: layers of the tower, for layers given as shares.
            last: the last layer whose output is read; reducing after it would be in vain.

        Raises:
            ConfigError: when so many cannot go.
        """

    @abstractmethod
    def reduce(self, layer: int, state: TowerState, k: int) -> TowerState:
        """The state with `k` patches, [CLS] first."""

    def parts(self, shape: TowerShape) -> Learned | None:
        """What the method learns, from its file or untrained; None where it learns nothing.

        Raises:
            CheckpointError, ConfigError: for a file that cannot be used.
        """
        return None

    def final(self, n: int, keep: float | int | None) -> int:
        """Patches left at the end by `keep`.

        Raises:
            ConfigError: without one.
        """
        return self.tokens_kept(n, self.budgeted(keep))


def layers_within(
    method: str, layers: Sequence[Layer] | None, depth: int, last: int
) -> tuple[int, ...]:
    """Absolute, ascending layers; all up to `last` when none are named.

    A share of depth that falls behind `last`, as in small towers it may, stands for `last`.

    Raises:
        ConfigError: for a layer after `last`.
    """
    if layers is None:
        return tuple(range(last + 1))
    named = ((layer, resolve_layer(layer, depth)) for layer in layers)
    resolved = tuple(sorted({min(i, last) if isinstance(n, float) else i for n, i in named}))
    if resolved[-1] > last:
        raise ConfigError(
            f"{method} is to reduce tokens in layer {resolved[-1]}, and what the model reads of "
            f"this tower is the output of layer {last}; name layers up to {last}."
        )
    return resolved
