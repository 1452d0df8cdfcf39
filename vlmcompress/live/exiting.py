"""Leaving the layers of a language model early: when, and what is remembered of it."""

from __future__ import annotations

from torch import Tensor

from vlmcompress.core.errors import UnsupportedInputError
from vlmcompress.live.rows import take_rows
from vlmcompress.methods.decoder.exiting import LayerExit


class Exits:
    """What an early exit does in one forward.

    Attributes:
        left: whether the rows have left.
    """

    def __init__(self, method: LayerExit, depth: int, log: list[int]) -> None:
        """Begin a forward.

        Args:
            method: decides.
            depth: layers of the model.
            log: layers that each forward has run; this one's is added behind them.
        """
        self._method, self._depth, self._log = method, depth, log
        self._log.append(0)
        self.left = False

    @property
    def log(self) -> list[int]:
        """Layers that were run, by the forwards of a conversation so far."""
        return self._log

    def saw(
        self, layer: int, before: Tensor, last_before: Tensor, after: Tensor, last_after: Tensor
    ) -> None:
        """Decide behind a layer.

        Args:
            layer: its number.
            before: [B, R, d] rows that came into it.
            last_before: [B, 1] the last row of each sample's prompt among them.
            after: [B, R', d] rows that came out of it.
            last_after: [B, 1].
        """
        self._log[-1] = layer + 1
        if layer + 1 == self._depth or self._method.never:
            return
        pair = (
            take_rows(x, rows)[:, 0] for x, rows in ((before, last_before), (after, last_after))
        )
        self.left = bool(self._method.leaves(layer, self._depth, *pair).all())


def refuse_training(name: str, training: bool) -> None:
    """Refuse layers that would go untrained without a word.

    Raises:
        UnsupportedInputError: in training.
    """
    if training:
        raise UnsupportedInputError(
            f"{name} passes over layers, which would learn nothing then; call model.eval(), or "
            "train inside `with handle.disabled():`."
        )
