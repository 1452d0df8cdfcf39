"""The language model of an unpatched model with rows hidden or cut by hand, layer by layer.

What a method decided is listened to (`listening`), where it says it; how the library then carries
it out is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmcompress.methods import Method
from vlmcompress.methods.decoder.base import DecoderState, Reduction, Site


@dataclass(frozen=True)
class Decision:
    """What a method was shown at a site, and what it answered."""

    site: Site
    state: DecoderState
    reduction: Reduction

    @property
    def layer(self) -> int:
        """The first layer whose attention goes without what was dropped."""
        return self.site.layer + (self.site.where == "between")

    @property
    def stays(self) -> Tensor:
        """[B, R] bool, rows that go on; text does in any case, padding does not."""
        return (self.reduction.keep | ~self.state.visual) & self.state.valid


@contextmanager
def listening(method: Method) -> Iterator[list[Decision]]:
    """Decisions of all methods of this class, as they are made."""
    kind, heard = type(method), []
    reduce, own = kind.reduce, "reduce" in vars(kind)

    def listened(self: Any, number: int, state: DecoderState, k: Tensor) -> Reduction:
        reduction = reduce(self, number, state, k)
        heard.append(Decision(self.sites(state.depth)[number], state, reduction))
        return reduction

    kind.reduce = listened
    try:
        yield heard
    finally:
        if own:
            kind.reduce = reduce
        else:
            del kind.reduce


@contextmanager
def _before_layers(model: Any, change: Callable[..., Any]) -> Iterator[None]:
    """`change(layer, hidden, kwargs)` gives what every layer reads instead."""

    def before(layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden, kwargs = change(layer, args[0], kwargs)
        return (hidden, *args[1:]), kwargs

    handles = [
        module.register_forward_pre_hook(partial(before, i), with_kwargs=True)
        for i, module in enumerate(model.get_decoder().layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- hiding -------------------------------------------------------------------------------------


def hidden_columns(
    placeholders: Tensor, decisions: Sequence[Decision], depth: int
) -> dict[int, Tensor]:
    """[B, L] bool per layer, and after the last one: visual columns that had gone before it.

    Args:
        placeholders: [B, L] bool, columns of visual tokens.
        decisions: made on a batch with these columns.
        depth: layers of the model.
    """
    gone = torch.zeros_like(placeholders)
    hidden = {layer: gone.clone() for layer in range(depth + 1)}
    for decision in decisions:
        dropped = decision.state.visual & ~decision.stays
        for b, rows in enumerate(dropped):
            columns = placeholders[b].nonzero()[:, 0]
            for layer in range(decision.layer, depth + 1):
                hidden[layer][b, columns[decision.state.ordinal[b][rows]]] = True
    return hidden


@contextmanager
def keys_hidden(model: Any, hidden: Mapping[int, Tensor]) -> Iterator[None]:
    """In layer i nobody sees the columns hidden[i] ([B, L] bool); nothing is shortened.

    Only the hidden columns' own rows see them, so that no row is left without a key.
    """

    def change(layer: int, states: Tensor, kwargs: dict[str, Any]) -> Any:
        length = states.shape[1]
        mask = kwargs["attention_mask"]
        if mask is None:
            square = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
            mask = square.expand(len(states), 1, -1, -1)
        own = torch.eye(length, dtype=torch.bool, device=states.device)
        seen = ~hidden[layer][:, None, None, :length] | own
        if mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
        return states, {**kwargs, "attention_mask": mask}

    with _before_layers(model, change):
        yield


# --- cutting ------------------------------------------------------------------------------------


class Cutter:
    """Cuts the rows of one sample before layers, as a method decided.

    Attributes:
        columns: [R] column of the prompt that each row is, -1 for merged rows.
        place: [R] column whose position each row has.
    """

    def __init__(self, decisions: Sequence[Decision], renumbers: bool, length: int) -> None:
        """For a prompt of some length, positions behind a cut counted anew or kept."""
        self._decisions, self._renumbers = decisions, renumbers
        self.columns = self.place = torch.arange(length)

    def __call__(self, layer: int, states: Tensor, kwargs: dict[str, Any]) -> Any:
        """Rows and arguments of a layer."""
        for decision in self._decisions:
            if decision.layer == layer:
                states = self._cut(decision.reduction, decision.stays, decision.state, states)
        if states.shape[1] == kwargs["position_embeddings"][0].shape[-2]:
            return states, kwargs
        order = torch.arange(states.shape[1])
        # Masks hold for places in the sequence where rows see those before them; the prefix of
        # models that see ahead stays in its order, so that its places are its columns.
        mask = kwargs["attention_mask"]
        if mask is not None:
            rows = self.columns if (self.columns >= 0).all() else order
            mask = mask[..., rows, :][..., rows]
        where = self.place
        embeddings = tuple(x[..., where, :] for x in kwargs["position_embeddings"])
        changed = {"attention_mask": mask, "position_embeddings": embeddings}
        return states, {**kwargs, **changed, "position_ids": order[None]}

    def _cut(
        self, reduction: Reduction, stays: Tensor, state: DecoderState, states: Tensor
    ) -> Tensor:
        kept = stays[0].nonzero()[:, 0]
        values = states if reduction.hidden is None else reduction.hidden
        rows, columns, place = values[:, kept], self.columns[kept], self.place[kept]
        if reduction.merged is not None:
            there = slice(None) if reduction.merged_valid is None else reduction.merged_valid[0]
            source = reduction.source[0, there]
            visual = state.visual[0, kept].nonzero()[:, 0]
            first = state.visual[0].nonzero()[0, 0]
            at = int(visual[-1]) + 1 if len(visual) else int(first)

            def joined(old: Tensor, new: Tensor, dim: int) -> Tensor:
                head, tail = old.tensor_split([at], dim)
                return torch.cat([head, new, tail], dim)

            rows = joined(rows, reduction.merged[:, there], 1)
            columns = joined(columns, torch.full_like(source, -1), 0)
            place = joined(place, self.place[source], 0)
        self.columns = columns
        self.place = torch.arange(len(columns)) if self._renumbers else place
        return rows.to(states.dtype)  # what was heard in half precision is also cut in float32


@contextmanager
def rows_cut(
    model: Any, decisions: Sequence[Decision], renumbers: bool, length: int
) -> Iterator[Cutter]:
    """The model's layers work on what is left; its logits have the rows `columns` names.

    A decision behind the last layer's attention cuts nothing: no later row is changed by it.
    """
    cutter = Cutter(decisions, renumbers, length)
    with _before_layers(model, cutter):
        yield cutter
