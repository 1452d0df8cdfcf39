"""The contract of methods that change what rows attend to: `AttentionEditor`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmcompress.methods.decoder.base import LayerMethod


class AttentionEditor(LayerMethod):
    """Inside the LLM: all rows go on, and some of them attend to others than the kernel says.

    Edited are rows of text behind an image, of the prompt and of the answer alike, in each layer by
    that layer's own softmax. Rows may be marked by what they hold as they come into a layer; marks
    stay with the layer's cache, so that the rows of later calls find them.
    """

    @property
    def own_budget(self) -> bool:
        """Nothing goes."""
        return True

    @abstractmethod
    def edited_layers(self, depth: int, width: int) -> tuple[int, ...]:
        """Layers whose attention is edited, ascending.

        Args:
            depth: layers of the model.
            width: of its rows.

        Raises:
            ConfigError: where there is nothing to edit in a model like that.
        """

    @abstractmethod
    def anchor(self, first: Tensor) -> Tensor:
        """What later rows are compared with, [B, a], of each sample's first row ([B, d])."""

    @abstractmethod
    def marks(self, hidden: Tensor, anchor: Tensor) -> Tensor:
        """[B, L] bool, which rows ([B, L, d]) are marked."""

    @abstractmethod
    def edit(self, weights: Tensor, visual: Tensor, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Other weights for some rows.

        Args:
            weights: [B, heads, r, C] float32 softmax rows over all keys.
            visual: [B, C] bool, keys of visual tokens.
            marked: [B, C] bool, keys of marked rows.

        Returns:
            [B, heads, r, C] the weights to attend with, and [B, heads, r] bool, which rows of which
            heads have changed.
        """


@dataclass(frozen=True)
class Marks:
    """What the cache of one layer knows of its keys.

    Attributes:
        anchor: [B, a] see `AttentionEditor.anchor`.
        visual: [B, C] bool, keys of visual tokens.
        marked: [B, C] bool.
    """

    anchor: Tensor
    visual: Tensor
    marked: Tensor

    def resized(self, keys: int) -> Marks:
        """Of so many keys: later ones are cut off, or there are further ones without a mark."""
        by = keys - self.visual.shape[1]
        return Marks(self.anchor, pad(self.visual, (0, by)), pad(self.marked, (0, by)))

    def grown(self, visual: Tensor, marked: Tensor) -> Marks:
        """With further keys ([B, c])."""
        return Marks(
            self.anchor,
            torch.cat([self.visual, visual], 1),
            torch.cat([self.marked, marked], 1),
        )

    def taken(self, keys: Tensor, valid: Tensor) -> Marks:
        """Some of the keys ([B, C']), of which some ([B, C'] bool) are none."""
        visual, marked = (flags.gather(1, keys) & valid for flags in (self.visual, self.marked))
        return Marks(self.anchor, visual, marked)

    def reordered(self, samples: Tensor) -> Marks:
        """With the samples in another order ([B])."""
        return Marks(self.anchor[samples], self.visual[samples], self.marked[samples])
