"""Selections that look at the answer key: upper and lower controls for the methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmcompress.core.errors import ConfigError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import TokenPruner

ORACLES = ("oracle", "oracle_asked", "anti_oracle")
"""Names of the selections by coverage."""

_GOLDEN = 0.6180339887498949
_TIE = 1e-3


@dataclass(init=False, eq=False)
class CoveragePruner(TokenPruner):
    """Keep the patches that objects cover most.

    Patches that are covered alike are spread over the image instead of taken from its top. No upper
    bound at small budgets: large objects use them up. The coverage belongs to one batch, so it is
    no hyperparameter (no dataclass field).
    """

    name: ClassVar[str] = "coverage"

    def __init__(self, coverage: Tensor) -> None:
        """Of one batch.

        Args:
            coverage: [images, n] share of each patch that objects cover, in the call's order.
        """
        self.coverage = coverage

    def score(self, tokens: VisualTokens) -> Tensor:
        """[b, n] coverage with ties broken."""
        rows = self.coverage[tokens.owner.to(self.coverage.device)].to(tokens.features.device)
        if rows.shape[1] != tokens.n_full:
            raise ConfigError(
                f"Coverage is given for {rows.shape[1]} patches; an image has {tokens.n_full}."
            )
        spread = (torch.arange(rows.shape[1], device=rows.device) * _GOLDEN) % 1
        return (rows.float() + _TIE * spread).gather(1, tokens.index)


def oracle(name: str, samples: Sequence[Any]) -> CoveragePruner:
    """The control `name` for one image per sample.

    Args:
        name: `oracle` (all objects), `oracle_asked` (the asked ones), `anti_oracle` (the reverse).
        samples: with `object_coverage` and `asked_coverage`, [n] each.
    """
    field = "asked_coverage" if name == "oracle_asked" else "object_coverage"
    coverage = torch.stack([torch.as_tensor(getattr(s, field)) for s in samples]).float()
    return CoveragePruner(coverage.amax() - coverage if name == "anti_oracle" else coverage)
