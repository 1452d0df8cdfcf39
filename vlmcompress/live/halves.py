"""A layer in two halves: where something happens between its attention and its MLP.

The layer's own forward runs twice. First until its second norm, where the rows are taken off and
the MLP is passed over; then on the rows that are left, with the attention passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


class Halves:
    """The state of one layer in halves.

    Args:
        rows: between [B, R, d] and the order of axes that the layer works in, either way.

    Attributes:
        which: half that runs; None where a layer runs whole.
    """

    def __init__(self, rows: Callable[[Tensor], Tensor] = _as_they_are) -> None:
        self._rows = rows
        self.which: Literal["attention", "mlp"] | None = None
        self._between: Tensor | None = None
        self._answer: Any = None

    def run(
        self, forward: Callable[[Tensor], Any], hidden: Tensor, between: Callable[[Tensor], Tensor]
    ) -> Any:
        """The output of a layer.

        Args:
            forward: of the layer, on rows [B, R, d].
            hidden: [B, R, d].
            between: what is done to the rows between the halves.
        """
        self.which = "attention"
        forward(hidden)
        assert self._between is not None  # the norm's hook saw to it
        hidden, self._between = self._between, None
        hidden = between(hidden)
        self.which = "mlp"
        output = forward(hidden)
        self.which, self._answer = None, None
        return output

    def attention(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a layer's attention does."""
        if self.which is None:
            return forward(*args, **kwargs)
        if self.which != "mlp":
            self._answer = forward(*args, **kwargs)
            return self._answer
        nothing = self.nothing(args[0] if args else kwargs["hidden_states"])
        return nothing if isinstance(self._answer, Tensor) else (nothing, None)

    def nothing(self, like: Tensor) -> Tensor:
        """What a part that is passed over adds."""
        return torch.zeros_like(self._first(like))

    def hold(self, hidden: Tensor) -> Tensor:
        """Take the rows off before the second norm; one goes on, so that shapes fit."""
        self._between = self._rows(hidden)
        return self._first(hidden)

    def _first(self, hidden: Tensor) -> Tensor:
        return self._rows(self._rows(hidden)[:, :1])
