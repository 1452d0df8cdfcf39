"""The language that image tokens speak: sums of the words that name what a patch shows.

Tower and language model meet in this code, so that each can learn alone: the tower to produce
it from pixels, the language model to answer from it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from .labels import CHARACTER_NAMES
from .questions import QUADRANTS
from .scenes import COLOUR_NAMES
from .sprites import DIGITS, SHAPES

_SHARPNESS = 14.0
_SOFT_EDGE = 0.08  # over how much of the half image one quadrant's word fades into the next


def _token(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    """The single token of a word after a space, of a digit without."""
    return tokenizer.encode(word if word in DIGITS else f" {word}")[0]


class Codes(nn.Module):
    """Word rows of every attribute, and directions for place and centre.

    Args:
        tokenizer: of the model; every attribute is one of its tokens.
        width: of the language model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, width: int) -> None:
        super().__init__()
        words = {
            "colour": COLOUR_NAMES,
            "shape": SHAPES,
            "glyph": (*CHARACTER_NAMES, "object"),
            "quadrant": QUADRANTS,
            "ground": ("ground",),
        }
        self.ids = {
            kind: torch.tensor([_token(tokenizer, word) for word in names])
            for kind, names in words.items()
        }
        self.place: Tensor
        self.centre: Tensor
        draw = torch.Generator().manual_seed(1)
        self.register_buffer("place", torch.randn(2, width, generator=draw))
        self.register_buffer("centre", torch.randn(width, generator=draw))

    def words(self, embedding: Tensor, kind: str) -> Tensor:
        """Rows ``[classes, width]`` of the embedding for one attribute."""
        return embedding[self.ids[kind].to(embedding.device)].detach()

    def logits(self, tokens: Tensor, embedding: Tensor, kind: str) -> Tensor:
        """How well tokens ``[..., width]`` match the words of an attribute."""
        normed = F.rms_norm(tokens, tokens.shape[-1:])
        rows = self.words(embedding, kind)
        if kind == "colour":  # one more class: no colour, ground
            rows = torch.cat([rows, self.words(embedding, "ground")])
        rows = F.rms_norm(rows, tokens.shape[-1:])
        return normed @ rows.T * (_SHARPNESS / tokens.shape[-1])

    def quadrants(self, where: Tensor) -> Tensor:
        """Soft membership ``[..., 4]`` of places in [-1, 1]."""
        right, below = torch.sigmoid(where / _SOFT_EDGE).unbind(-1)
        parts = [(1 - below) * (1 - right), (1 - below) * right, below * (1 - right), below * right]
        return torch.stack(parts, dim=-1)

    def encode(
        self,
        embedding: Tensor,
        where: Tensor,
        centre: Tensor,
        mixes: dict[str, Tensor],
        ground: Tensor,
    ) -> Tensor:
        """Tokens of unit scale that say what patches show.

        Args:
            embedding: word embedding ``[vocabulary, width]``.
            where: ``[..., 2]`` places.
            centre: ``[...]`` weight of the centre direction.
            mixes: ``[..., classes]`` weights of the words of colour, shape and glyph.
            ground: ``[...]`` weight of the ground's word.
        """
        total = self.quadrants(where) @ self.words(embedding, "quadrant")
        total = total + 1.7 * where @ self.place + centre[..., None] * self.centre
        for kind, mix in mixes.items():
            total = total + mix @ self.words(embedding, kind)
        total = total + ground[..., None] * self.words(embedding, "ground")[0]
        return F.rms_norm(total, total.shape[-1:])
