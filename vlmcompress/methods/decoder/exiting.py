"""The contract of methods that leave the LLM early: `LayerExit`."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from vlmcompress.methods.decoder.base import LayerMethod


class LayerExit(LayerMethod):
    """Inside the LLM: behind some layer all rows leave, and later layers are passed over.

    These still make the keys and values of the rows that left, so that caches keep their lengths;
    nothing else of them is run. Every forward decides anew, for its whole batch.
    """

    @property
    def own_budget(self) -> bool:
        """No token goes."""
        return True

    @property
    def never(self) -> bool:
        """Whether no forward can leave early, so that none need be looked at."""
        return False

    def check_depth(self, depth: int) -> None:
        """Refuse options that cannot be meant for a model of `depth` layers.

        Raises:
            ConfigError: for such options.
        """

    @abstractmethod
    def leaves(self, layer: int, depth: int, before: Tensor, after: Tensor) -> Tensor:
        """[B] bool, which samples need no later layer; rows leave when none of a batch does.

        Args:
            layer: that has just run.
            depth: layers of the model.
            before: [B, d] the last row of each sample as it came into the layer.
            after: [B, d] as it came out of it.
        """
