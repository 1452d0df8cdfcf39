"""What methods that replace tokens by codes of their clusters have in common: `Clustered`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError, ConfigTypeError, UnsupportedInputError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import AdaptiveCompressor, FeatureSpace
from vlmcompress.methods.ops import kmeans
from vlmcompress.methods.ops.kmeans import Clusters
from vlmcompress.methods.ops.merging import group_mean
from vlmcompress.methods.options import check_choice, check_count
from vlmcompress.methods.parts import Partition
from vlmcompress.methods.trained import LearnedCompressor

Criterion = Literal["elbow", "silhouette"]
CRITERIA: tuple[Criterion, ...] = ("elbow", "silhouette")


@dataclass(frozen=True)
class Clustered(LearnedCompressor, AdaptiveCompressor):
    """Cosine k-means of all tokens of an image or video; each cluster becomes one row.

    Frames of a video, and views of an image cut into tiles, are clustered jointly. Every cluster
    has at least one token: one that k-means leaves empty takes a token (`ops.kmeans.filled`).

    Attributes:
        smallest: number of clusters that the search of `keep="auto"` begins with.
        largest: number that it ends with; no more than there are tokens.
        criterion: what it goes by: the `elbow` of the squared distances to the centres, or the
            best mean `silhouette`.
        iterations: of k-means at most, for each number of clusters.
        rescale: whether codes, which are means of rows of unit length, are multiplied by the mean
            length of the tokens, so that they have the scale that the LLM knows.
    """

    reads: ClassVar[FeatureSpace] = "llm"
    partition: ClassVar[Partition] = Partition(scope="image")
    smallest: int = 12
    largest: int = 32
    criterion: Criterion = "elbow"
    iterations: int = 50
    rescale: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_count(self.name, "smallest", self.smallest)
        check_count(self.name, "largest", self.largest, self.smallest)
        check_count(self.name, "iterations", self.iterations)
        check_choice(self.name, "criterion", self.criterion, CRITERIA)
        self._check_flags("rescale")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigTypeError(
                    f"{self.name}'s {name} is {value!r}; it must be True or False."
                )

    @abstractmethod
    def rows(self, tokens: VisualTokens, codes: Tensor, labels: Tensor) -> Tensor:
        """The rows that stand for the clusters, before they are rescaled: [b, k, d].

        Args:
            tokens: before.
            codes: [b, k, d] mean of each cluster's tokens, which have unit length, in float32 or
                better.
            labels: [b, n] cluster of each token.
        """

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Replace the tokens by those of `keep` clusters, in the order of their first tokens.

        Raises:
            UnsupportedInputError: for NaN or infinity.
        """
        k = self.nominal(tokens.n, keep)
        if k >= tokens.n and not self.learns:
            return tokens
        x = directions(self.name, tokens)
        return self.coded(tokens, x, self.clusters(tokens, x, self.start(tokens, x, k)))

    def start(self, tokens: VisualTokens, x: Tensor, k: int) -> Tensor:
        """The centres, [b, k, d], that k-means begins with."""
        return kmeans.seeds(x, k, self.seed, weights=tokens.mass)

    def clusters(self, tokens: VisualTokens, x: Tensor, start: Tensor) -> Clusters:
        """K-means of rows of unit length ([b, n, d]) from `start` ([b, k, d])."""
        return kmeans.kmeans(x, start, iterations=self.iterations, weights=tokens.mass)

    def coded(self, tokens: VisualTokens, x: Tensor, clusters: Clusters) -> VisualTokens:
        """Each cluster of `x` ([b, n, d], the tokens at unit length) as one row.

        The first of its tokens represents it.
        """
        k = clusters.k
        labels = kmeans.filled(x, clusters)
        if self.raster_order:
            labels, source = kmeans.in_order(labels, k)
        else:
            source = kmeans.first_rows(labels, k)
        rows = self.rows(tokens, self.codebook(tokens, x, labels, k), labels)
        return tokens.regroup(self.scaled(tokens, rows), source, labels)

    def codebook(self, tokens: VisualTokens, x: Tensor, labels: Tensor, k: int) -> Tensor:
        """[b, k, d] means of the clusters' rows of `x` ([b, n, d]); gradients reach all of them."""
        return group_mean(x, labels, k, tokens.mass)

    def scaled(self, tokens: VisualTokens, rows: Tensor) -> Tensor:
        """Rows in the dtype of the tokens, and in their scale where `rescale` says so."""
        if self.rescale:
            length = tokens.features.to(rows.dtype).norm(dim=2) * tokens.mass
            rows = rows * (length.sum(1) / tokens.mass.sum(1))[:, None, None]
        return rows.to(tokens.features.dtype)

    def counts(self, tokens: VisualTokens) -> list[int]:
        """Clusters by the criterion, between `smallest` and `largest`; all of fewer tokens."""
        if tokens.n <= self.smallest:
            return [tokens.n] * len(tokens.features)
        trials, chosen = self.searched(tokens, directions(self.name, tokens))
        return [trials[i].k for i in chosen]

    def adapt(self, tokens: VisualTokens) -> VisualTokens:
        """As many codes as `counts` says, of the clusters that the search found."""
        if tokens.n <= self.smallest:
            return self.compress(tokens, tokens.n)
        x = directions(self.name, tokens)
        trials, chosen = self.searched(tokens, x)
        return self.coded(tokens, x, trials[only(self.name, chosen)])

    def searched(self, tokens: VisualTokens, x: Tensor) -> tuple[list[Clusters], list[int]]:
        """Clusters by number of them, and which each unit takes."""
        trials = self.trials(tokens, x, range(self.smallest, min(self.largest, tokens.n) + 1))
        return trials, self.chosen(x, trials).tolist()

    def trials(self, tokens: VisualTokens, x: Tensor, sizes: Sequence[int]) -> list[Clusters]:
        """Clusters of each of the ascending sizes.

        All but the first begin with the centres of the one before and new ones drawn as by
        k-means++, and need few iterations.
        """
        found: list[Clusters] = []
        for k in sizes:
            if found:
                start = kmeans.seeds(x, k, self.seed, weights=tokens.mass, given=found[-1].centres)
            else:
                start = self.start(tokens, x, k)
            found.append(self.clusters(tokens, x, start))
        return found

    def chosen(self, x: Tensor, trials: Sequence[Clusters]) -> Tensor:
        """[b] which trial each unit takes."""
        if self.criterion == "elbow":
            return kmeans.elbow(torch.stack([kmeans.distortion(x, c) for c in trials], 1))
        scores = [kmeans.silhouette(x, c.labels, c.k) for c in trials]
        return torch.stack(scores, 1).argmax(1)


def only(method: str, chosen: Sequence[int]) -> int:
    """The trial that all units took.

    Raises:
        ConfigError: when they took several.
    """
    if len(set(chosen)) != 1:
        raise ConfigError(
            f"{method} comes to different numbers of codes for images of one group; `adapt` takes "
            "images of one count, as `counts` gives it."
        )
    return chosen[0]


def directions(method: str, tokens: VisualTokens) -> Tensor:
    """[b, n, d] tokens at unit length, in float32 or better.

    Raises:
        UnsupportedInputError: for NaN or infinity, which belong to no cluster.
    """
    x = kmeans.unit(tokens.features)
    if not bool(x.sum(2).isfinite().all()):  # rows that hold either are NaN now, in part
        raise UnsupportedInputError(
            f"{method} cannot cluster tokens that hold NaN or infinity; look at the pixels, and at "
            "the model's dtype for overflow (float16 is too narrow for some towers; bfloat16 is "
            "not)."
        )
    return x
