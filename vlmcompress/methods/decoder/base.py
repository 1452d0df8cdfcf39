"""The contract of methods inside the language model.

A reducer is asked at its sites, once per prompt, which rows go on. It sees tensors only: the rows
of that place, which of them are visual, and the attention it asked for. What it drops is gone for
all later layers, their caches included.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError, EvidenceError
from vlmcompress.methods.base import Layer, Method, Stage
from vlmcompress.methods.decoder.attention import DecoderAttention
from vlmcompress.methods.learned import Learned, Parts, required
from vlmcompress.methods.ops.topk import ranks
from vlmcompress.methods.options import resolve_layer

Where: TypeAlias = Literal["before", "between"]
Reads: TypeAlias = Literal["nothing", "previous", "own", "next", "features"]
Positions: TypeAlias = Literal["original", "contiguous"]


@dataclass(frozen=True, order=True)
class Site:
    """A place in the language model.

    Attributes:
        layer: absolute index.
        where: before that layer, or between its attention and its MLP.
    """

    layer: int
    where: Where = "before"


@dataclass(frozen=True)
class DecoderShape:
    """What the trained parts of a method are made for.

    Attributes:
        depth: layers of the model.
        width: of its rows.
    """

    depth: int
    width: int


@dataclass(frozen=True)
class DecoderState:
    """The language model's rows at a site during prefill.

    Attributes:
        hidden: [B, L, d].
        visual: [B, L] bool, rows that are visual tokens.
        valid: [B, L] bool, rows that are no padding.
        text: [B, L] bool, rows of text behind the last visual token of their sample (all text of a
            sample without one).
        ordinal: [B, L] which of its sample's visual tokens a row was at first, -1 for text.
        unit: [B, L] which image of the call each visual row belongs to, -1 for text.
        place: [B, L, 2] (row, column) of visual rows in the grid of their image, 0 for text.
        grid: [B, L, 2] (height, width) of that grid, 1 for text.
        given: [B, L] bool, rows of the prompt; a draft may follow it.
        depth: layers of the model.
        attention: of the layer that the method reads; None unless it reads any.
        earlier: [B, L, d] the same rows as they came into the layer before; None unless read.
        answers: [B, L] bool, rows that a label follows while the row itself has none (the last of
            each instruction); None outside training.
        embedded: [B, L, d] the same rows as they came into layer 0; None unless read.
        notes: [B, L] what the method wrote down beside these rows at its last site; None before
            that, and 0 for merged rows.
        faint: [B, L] bool, visual rows that soft masks let through and that would be dropped
            outside training; None where nothing was masked softly.
        parts: what the method has learnt; None where it learns nothing.
    """

    hidden: Tensor
    visual: Tensor
    valid: Tensor
    text: Tensor
    ordinal: Tensor
    unit: Tensor
    place: Tensor
    grid: Tensor
    given: Tensor
    depth: int
    attention: DecoderAttention | None = None
    earlier: Tensor | None = None
    answers: Tensor | None = None
    embedded: Tensor | None = None
    notes: Tensor | None = None
    faint: Tensor | None = None
    parts: Learned | None = None

    def attended(self) -> DecoderAttention:
        """The attention that was asked for.

        Raises:
            EvidenceError: when it was not read.
        """
        if self.attention is None:
            raise EvidenceError("A method in the LLM needs a layer's attention; none was read.")
        return self.attention

    def learnt(self, kind: type[Parts]) -> Parts:
        """What the method has learnt.

        Raises:
            EvidenceError: when the state has none of that kind.
        """
        return required(self.parts, kind, "LLM")

    @property
    def last(self) -> Tensor:
        """[B, 1] the last row of each sample's prompt."""
        rows = torch.arange(self.valid.shape[1], device=self.valid.device)
        return torch.where(self.valid & self.given, rows, 0).amax(1, keepdim=True)


@dataclass(frozen=True)
class Reduction:
    """What a method decided at a site.

    Attributes:
        keep: [B, L] bool, rows that go on; all text must.
        hidden: [B, L, d] the rows' new values, None where they stay as they are.
        merged: [B, m, d] rows that are added behind the last visual row that stays.
        merged_valid: [B, m] bool, which of them there are; None for all.
        source: [B, m] row that each of them stands for, for its place in the image.
        crop_earlier: whether the caches of earlier layers are cut to the same rows.
        notes: [B, L] what the method wants to know of these rows at its next site.
        soft: [B, L] in training, log of a mask in (0, 1] that later layers' attention to each row
            is multiplied by before it is normalised. All rows go on then; `keep` says which would
            outside training.
    """

    keep: Tensor
    hidden: Tensor | None = None
    merged: Tensor | None = None
    merged_valid: Tensor | None = None
    source: Tensor | None = None
    crop_earlier: bool = False
    notes: Tensor | None = None
    soft: Tensor | None = None


class LayerMethod(Method):
    """Inside the LLM: what all kinds of methods there share.

    Class attributes:
        looks_at: what decides, in a few words, for the table of methods.
    """

    stage: ClassVar[Stage] = "decoder"
    looks_at: ClassVar[str] = ""

    def parts(self, shape: DecoderShape) -> Learned | None:
        """What the method learns, from its file or untrained; None where it learns nothing.

        They come in evaluation mode. A method with soft masks makes them when its parts are put
        into training mode.

        Raises:
            CheckpointError, ConfigError: for a file that cannot be used.
        """
        return None


class LayerReducer(LayerMethod):
    """Inside the LLM: drops or merges visual tokens at some layers.

    A budget is for all visual tokens of a sample together, however many images they come from.

    Class attributes:
        reads: which layer's attention `reduce` is handed: of the layer `previous` to the site, of
            its `own` (between attention and MLP), of the `next` (queries and keys that it is about
            to make); or `features`, the rows before the previous layer; or `nothing`.
        renumbers: position ids behind a site, as published: kept (`original`) or counted anew
            (`contiguous`).
        reads_embedded: whether `reduce` is handed the rows as they came into layer 0.
        merges: whether it adds merged rows.
        repeatable: whether what is dropped depends on earlier rows only, so that decoding with and
            without a cache agree.
    """

    reads: ClassVar[Reads] = "nothing"
    renumbers: ClassVar[Positions] = "original"
    reads_embedded: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    repeatable: ClassVar[bool] = False

    @property
    def rotated(self) -> bool:
        """Whether queries and keys of the `next` layer are seen with their positions rotated in."""
        return True

    @abstractmethod
    def sites(self, depth: int) -> tuple[Site, ...]:
        """Where the method acts in a model of `depth` layers, in ascending order."""

    @abstractmethod
    def counts(self, n: int, keep: float | int | None, depth: int) -> tuple[int, ...]:
        """Visual tokens of a sample left after each site.

        Exact for methods with `count_kind` `exact`, else the most there can be.

        Args:
            n: visual tokens of the sample that enter the model.
            keep: what leaves the last site, a fraction or a count; None with a budget of its own.
            depth: layers of the model.
        """

    def queries(self, state: DecoderState) -> Tensor:
        """[B, r] rows whose attention is looked at; the last of each sample."""
        return state.last

    @abstractmethod
    def reduce(self, site: int, state: DecoderState, k: Tensor) -> Reduction:
        """The reduction at the site of number `site`; `k` ([B] int64) is what `counts` allows."""

    def final(self, n: int, keep: float | int | None) -> int:
        """Tokens left at the end by `keep`.

        Raises:
            ConfigError: without one.
        """
        return keeping.count(self.budgeted(keep), n)


class LayerPruner(LayerReducer):
    """Keeps the visual tokens with the highest scores at each site, in their order."""

    @abstractmethod
    def score(self, state: DecoderState) -> Tensor:
        """[B, L] float32, larger stays; only those of visual rows count."""

    def reduce(self, site: int, state: DecoderState, k: Tensor) -> Reduction:
        """Keep the `k` best; ties go to the earlier row."""
        return Reduction(best(self.score(state), state.visual, k))


def best(scores: Tensor, visual: Tensor, k: Tensor) -> Tensor:
    """[B, L] bool: all text, and per sample the `k` ([B]) visual rows with the highest scores.

    Ties go to the earlier row.
    """
    place = ranks(scores.masked_fill(~visual, -torch.inf))
    return ~visual | (place < k.to(place.device)[:, None])


def last_row_attention(state: DecoderState, rows: Tensor | None = None) -> Tensor:
    """[B, L] attention of some queries to every row, averaged over heads and queries.

    Args:
        state: with the attention that was read.
        rows: [B, r] queries; the last row when not given.
    """
    weights = state.attended().weights(state.last if rows is None else rows)
    return weights.mean((1, 2))


def sites_before(method: str, layers: Sequence[Layer], depth: int) -> tuple[Site, ...]:
    """Sites before some layers, which must be named in the order of depth.

    Raises:
        ConfigError: for layer 0 (which is between tower and LLM), layers out of order, or two that
            resolve to one.
    """
    # A share stands for layer 1 at least, where small models round it down to 0.
    resolved = [
        max(i, 1) if isinstance(layer, float) else i
        for layer, i in ((layer, resolve_layer(layer, depth)) for layer in layers)
    ]
    if any(late <= early for early, late in pairwise(resolved)):
        raise ConfigError(
            f"{method}'s layers {list(layers)} resolve to {resolved} in a model of {depth} layers; "
            "they must be different and ascend. Name other layers for a model this deep."
        )
    if resolved[0] == 0:
        raise ConfigError(
            f"{method} is to drop tokens before layer 0 of {depth}; use a method between tower and "
            "LLM for that, or name layers from 1 on."
        )
    return tuple(Site(layer) for layer in resolved)
