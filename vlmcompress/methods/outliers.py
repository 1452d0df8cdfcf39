"""Patches that look important and are not: left to the last by any method that scores.

Vision transformers turn a few patches of plain background into stores of global information. Such
patches are told by states of great length (registers, arXiv 2309.16588) and by the attention [CLS]
pays them (DAMRO, arXiv 2410.04514): methods that rank by [CLS] attention pick them first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError, EvidenceError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import Layer, Needs, check_number

Kind: TypeAlias = Literal["norm", "cls"]

#: Median absolute deviation of the normal distribution with a standard deviation of 1.
_MAD_OF_NORMAL = 0.6744897501960817


@dataclass(frozen=True)
class Outliers:
    """Which patches are ranked after all others.

    A patch is an outlier when its value lies more than `outlier_threshold` robust standard
    deviations above the median of what one budget is for (a view, or an image). Both papers give
    other rules: a fixed length for one model, and the ten patches with the most attention; a
    robust z-score holds for every model and says "none" where there are none.

    Attributes:
        exclude_outliers: `norm` looks at the length of the states that the connector reads; `cls`
            at the logarithm of the [CLS] attention (mean over heads) in the penultimate layer,
            as attention is spread over orders of magnitude; None excludes nothing.
        outlier_threshold: robust standard deviations. 3.5 is usual (Iglewicz and Hoaglin, 1993).
    """

    exclude_outliers: Kind | None = None
    outlier_threshold: float = 3.5

    #: Whose [CLS] row `cls` reads, as DAMRO does.
    layer: ClassVar[Layer] = -2

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            ConfigError, ConfigTypeError: for values that make no sense.
        """
        if self.exclude_outliers is not None and self.exclude_outliers not in get_args(Kind):
            raise ConfigError(
                f"exclude_outliers is {self.exclude_outliers!r}; allowed are 'norm', 'cls' and "
                "None."
            )
        check_number("A stage", "outlier_threshold", self.outlier_threshold, 0, float("inf"))

    def needs(self) -> Needs:
        """The evidence that outliers are told by."""
        return Needs(
            cls_attention=(self.layer,) if self.exclude_outliers == "cls" else (),
            norms=self.exclude_outliers == "norm",
        )

    def marked(self, tokens: VisualTokens, cls_attention: Mapping[int, Tensor]) -> VisualTokens:
        """Tokens with their outliers noted in the evidence.

        Args:
            tokens: what one budget is for.
            cls_attention: {layer: [b, heads, n]} of `layer` alone, for `cls`.

        Raises:
            EvidenceError: when what they are told by was not captured.
        """
        if self.exclude_outliers is None:
            return tokens
        values = self._values(tokens, cls_attention)
        values = values.masked_fill(tokens.structural[tokens.index], torch.nan)
        evidence = dataclasses.replace(
            tokens.evidence, outliers=far_above(values, self.outlier_threshold)
        )
        return dataclasses.replace(tokens, evidence=evidence)

    def _values(self, tokens: VisualTokens, cls_attention: Mapping[int, Tensor]) -> Tensor:
        """[b, n] float32."""
        if self.exclude_outliers == "norm":
            if tokens.evidence.norms is None:
                raise EvidenceError(
                    "exclude_outliers='norm' needs the length of the tower's states, and it was "
                    "not captured."
                )
            return tokens.evidence.norms.float()
        if len(cls_attention) != 1:
            raise EvidenceError(
                "exclude_outliers='cls' needs the [CLS] attention of one layer; captured were "
                f"{sorted(cls_attention)}."
            )
        (row,) = cls_attention.values()
        return row.float().mean(1).clamp(min=torch.finfo(torch.float32).tiny).log()


def far_above(values: Tensor, threshold: float) -> Tensor:
    """[b, n] bool: values ([b, n]) with a robust z-score above a threshold; NaN never, nor counted.

    The z-score is the distance from the median over the median absolute deviation, in units of a
    normal distribution's standard deviation; differences within rounding are none.
    """
    middle = values.nanquantile(0.5, dim=1, keepdim=True)
    above = values - middle
    spread = above.abs().nanquantile(0.5, dim=1, keepdim=True)
    rounding = 8 * torch.finfo(values.dtype).eps * middle.abs()
    return _MAD_OF_NORMAL * above > threshold * torch.maximum(spread, rounding)
