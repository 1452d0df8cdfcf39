"""The contracts that compression methods implement, one base class per stage.

A method is a frozen dataclass: its fields are its hyperparameters with the paper's defaults, and
one function does the work. Methods see tensors only; which model they run in is not their business.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from vlmcompress.core import keep as keeping
from vlmcompress.core.errors import ConfigError, EvidenceError, UnsupportedInputError
from vlmcompress.core.keep import AutoKeep, Keep
from vlmcompress.core.tokens import Segment, VisualTokens
from vlmcompress.methods.ops.shares import apportion, at_least_one
from vlmcompress.methods.ops.topk import top_k
from vlmcompress.methods.options import (
    Layer,
    check_count,
    check_layers,
    check_number,
    check_share,
    resolve_layer,
)
from vlmcompress.methods.parts import Partition

Stage: TypeAlias = Literal["tower", "connector", "decoder", "prompt"]
CountKind: TypeAlias = Literal["exact", "at_most", "content"]
FeatureSpace: TypeAlias = Literal["none", "tower", "llm"]


@dataclass(frozen=True)
class Needs:
    """The evidence a method asks for.

    Layers are ints (negative allowed) or floats in (0, 1), shares of depth. `Evidence` says what
    each kind is.
    """

    cls_attention: tuple[Layer, ...] = ()
    received_attention: tuple[Layer, ...] = ()
    keys: tuple[Layer, ...] = ()
    text: bool = False
    wide_cls_attention: tuple[Layer, ...] = ()
    cls_features: bool = False
    norms: bool = False
    states: tuple[Layer, ...] = ()
    question: bool = False

    @property
    def asks(self) -> bool:
        """Whether the question must be known, in whatever form."""
        return self.text or self.question

    @property
    def attention(self) -> bool:
        """Whether anything must be read from tower attention layers."""
        return len(self.layers) > len(self.states)

    @property
    def cls(self) -> bool:
        """Whether the tower must have a [CLS] token."""
        return bool(self.cls_attention or self.wide_cls_attention or self.cls_features)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer something is read from."""
        return (
            *self.cls_attention,
            *self.received_attention,
            *self.keys,
            *self.wide_cls_attention,
            *self.states,
        )

    @classmethod
    def together(cls, needs: Iterable[Needs]) -> Needs:
        """What several ask for."""
        every = list(needs)
        return cls(
            cls_attention=tuple(layer for n in every for layer in n.cls_attention),
            received_attention=tuple(layer for n in every for layer in n.received_attention),
            keys=tuple(layer for n in every for layer in n.keys),
            text=any(n.text for n in every),
            wide_cls_attention=tuple(layer for n in every for layer in n.wide_cls_attention),
            cls_features=any(n.cls_features for n in every),
            norms=any(n.norms for n in every),
            states=tuple(layer for n in every for layer in n.states),
            question=any(n.question for n in every),
        )


class Method(ABC):
    """What all methods share.

    Class attributes:
        name: the registry name, a lower-case identifier.
        stage: where the method acts.
        paper: link to the source.
        count_kind: `exact` (the count is known before any pixel), `at_most`, or `content`.
        training_free: whether it works without trained weights of its own.
        stochastic: whether what it keeps depends on the seed.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    paper: ClassVar[str] = ""
    count_kind: ClassVar[CountKind] = "exact"
    training_free: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False

    @property
    def own_budget(self) -> bool:
        """Whether the method's options say how many tokens stay, so that `keep` must not."""
        return False

    @property
    def learns(self) -> bool:
        """Whether it has parts that are trained."""
        return False

    def budgeted(self, keep: float | int | None, example: float = 0.5) -> float | int:
        """`keep`, which a method without a budget of its own must be given.

        Raises:
            ConfigError: for None, with an example of how to write one.
        """
        if keep is None:
            raise ConfigError(
                f"{self.name} has no budget: write '{self.name}:{example}', for example."
            )
        return keep

    def needs(self) -> Needs:
        """The evidence this method reads."""
        return Needs()

    def options(self) -> dict[str, Any]:
        """Hyperparameters as a JSON-ready dict (tuples become lists)."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


class TokenCompressor(Method):
    """Between tower and LLM: fewer tokens out than in.

    Class attributes:
        reads: whose features `compress` looks at or changes. `none`: only evidence and places, so
            tokens are dropped before the connector; `tower`: features before the connector; `llm`:
            after it.
        gives: whose rows come out of `compress` before the connector: the `tower`'s, or the
            `llm`'s in place of the connector.
        scored: whether `score` exists, which `keep="auto"` needs.
        partition: what a budget is for and what becomes of newlines in images that were cut into
            tiles, as published; users change it with the options `scope` and `newlines`.
    """

    stage: ClassVar[Stage] = "connector"
    partition: ClassVar[Partition] = Partition()
    reads: ClassVar[FeatureSpace] = "none"
    gives: ClassVar[Literal["tower", "llm"]] = "tower"
    scored: ClassVar[bool] = False

    @property
    def own_keep(self) -> float | int | None:
        """What the options say of how many tokens stay; None where `keep` says it."""
        return None

    @property
    def own_budget(self) -> bool:
        """Where the options say it."""
        return self.own_keep is not None

    @property
    def raster_order(self) -> bool:
        """Whether rows come out in the order of their places, which original positions need."""
        return True

    @property
    def ragged(self) -> bool:
        """Whether images of one shape, cut into tiles, come out of different lengths.

        Each then goes through `compress` alone.
        """
        return False

    def sections(self, k: int, whole: bool) -> list[int]:
        """Which section of an image's rows each of the k rows of one of its parts goes to.

        Only asked for where rows come out in no raster order. Section 0 holds rows of all parts in
        the order of their places; every other one, before or after it, those of part after part.

        Args:
            k: rows left of the part.
            whole: whether the part is the view of the whole image.
        """
        return [0] * k

    def tokens_kept(self, segments: Sequence[Segment], keep: float | int) -> int:
        """Tokens left of a unit, known before any pixel is seen.

        Args:
            segments: the unit's rectangles of tokens.
            keep: fraction or count.
        """
        return self.nominal(sum(s.length for s in segments), keep)

    def nominal(self, n: int, keep: float | int) -> int:
        """What `keep` says of n tokens; methods whose released code rounds otherwise do, too."""
        return keeping.count(keep, n)

    def allocate(self, units: Sequence[Sequence[Segment]], keep: float | int) -> list[int]:
        """Shares of several units in one budget, in proportion to their tokens, at least 1 each.

        Args:
            units: rectangles of tokens of each.
            keep: fraction of the tokens of all, or a count for all. A fraction that leaves fewer
                tokens than units is raised to one token each.

        Returns:
            A count for each unit, known before any pixel is seen. They sum up to `nominal` of all
            tokens.

        Raises:
            UnsupportedInputError: when a count is smaller than the number of units.
        """
        sizes = [sum(s.length for s in segments) for segments in units]
        total = self.nominal(sum(sizes), keep)
        if total < len(units) and isinstance(keep, int):
            raise UnsupportedInputError(
                f"A prompt has {len(units)} images and keep={keep} for all of them together; every "
                "image keeps at least one token. Keep more, or give each image a budget of its own "
                "with scope='image'."
            )
        return at_least_one(apportion(max(total, len(units)), sizes, sizes))

    def budget(self, tokens: VisualTokens, keep: float | int) -> int:
        """Tokens left of each unit, also where an earlier method has thinned them out."""
        return self.tokens_kept(tokens.current_segments, keep)

    @abstractmethod
    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Reduce every unit of `tokens` ([b, n, d]) to `tokens_kept` rows."""


class TokenPruner(TokenCompressor):
    """Drops the tokens with the lowest scores and keeps spatial order."""

    scored: ClassVar[bool] = True

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """Importance of each token, [b, n] float32, non-negative; larger stays."""

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep the `tokens_kept` best rows, in their original order; ties go to the lower index.

        Outliers that the evidence names are ranked after all others.
        """
        k = self.budget(tokens, keep)
        return tokens.select(top_k(self.score(tokens), k, tokens.evidence.outliers))


class AdaptiveCompressor(TokenCompressor):
    """Decides by itself how many tokens an image needs when `keep="auto"`."""

    @abstractmethod
    def counts(self, tokens: VisualTokens) -> list[int]:
        """Tokens that `adapt` leaves of each unit; depends on content."""

    @abstractmethod
    def adapt(self, tokens: VisualTokens) -> VisualTokens:
        """Reduce units for which `counts` is equal."""


def head_mean_sum(rows: Iterable[Tensor]) -> Tensor:
    """Sum over layers of the mean over heads: [b, n] float32 from rows of [b, heads, n].

    Raises:
        EvidenceError: when there is no row.
    """
    means = [row.float().mean(1) for row in rows]
    if not means:
        raise EvidenceError("No attention was captured for a method that ranks tokens by it.")
    return torch.stack(means).sum(0)


def only_row(rows: Mapping[int, Tensor]) -> Tensor:
    """What was captured of the single layer a method asked for.

    Raises:
        EvidenceError: when there are none or several.
    """
    if len(rows) != 1:
        raise EvidenceError(f"Evidence of one layer is needed; captured were {sorted(rows)}.")
    return next(iter(rows.values()))


__all__ = [
    "AdaptiveCompressor",
    "AutoKeep",
    "FeatureSpace",
    "Keep",
    "Layer",
    "Method",
    "Needs",
    "TokenCompressor",
    "TokenPruner",
    "check_count",
    "check_layers",
    "check_number",
    "check_share",
    "head_mean_sum",
    "only_row",
    "resolve_layer",
]
