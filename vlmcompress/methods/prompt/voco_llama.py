"""VoCo-LLaMA: text sees the image only through a few tokens of the LLM's own (arXiv 2406.12275).

A prompt is cut into blocks: block 0 is its text, and every image with its compression tokens is a
block of its own. Rows attend inside their block; text attends to the compression tokens of all
blocks besides. What a block's compression tokens leave in the cache is therefore all that is needed
of an image, and does not depend on what is asked about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import CheckpointError, UnsupportedInputError
from vlmcompress.methods.learned import Learned

#: Row of the released table of embeddings that belongs to the compression token.
RELEASED_ID = 32000


class VocoTokens(Learned):
    """Embeddings of the compression tokens.

    The released model has one for all of them, row 32,000 of its table; here each token has its
    own, and those of a released file start out equal. They are drawn as Llama draws embeddings.

    Args:
        tokens: per image.
        width: of the LLM's rows.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(method="voco_llama", tokens=tokens, width=width)
        self.embed_tokens = nn.Embedding(tokens, width)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)

    def rows(self, images: int, dtype: torch.dtype) -> Tensor:
        """[images, tokens, width], the same for every image."""
        return self.embed_tokens.weight.to(dtype).expand(images, -1, -1)

    def released(self, name: str, tensor: Tensor) -> Tensor:
        """The row of the compression token in the released table of embeddings, for each of ours.

        Raises:
            CheckpointError: for a table without that row.
        """
        if tensor.ndim != 2 or len(tensor) <= RELEASED_ID:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, and the compression token is row "
                f"{RELEASED_ID}; give a checkpoint of VoCo-LLaMA."
            )
        return tensor[RELEASED_ID].expand(len(self.embed_tokens.weight), -1)


@dataclass(frozen=True)
class Blocks:
    """How the rows of a batch of prompts belong together.

    Attributes:
        number: [B, L] int64, 0 for text, i for the i-th image with its compression tokens.
        voco: [B, L] bool, compression tokens.
        valid: [B, L] bool, false where padded.
    """

    number: Tensor
    voco: Tensor
    valid: Tensor

    @classmethod
    def of(cls, image: Tensor, voco: Tensor, valid: Tensor | None = None) -> Blocks:
        """Blocks of prompts with any number of images, text before, between and behind them.

        Args:
            image: [B, L] int64, which image each row shows or compresses, from 1 on; 0 for text.
            voco: [B, L] bool, rows that compress; they stand behind all others of their image.
            valid: [B, L] bool, false where padded; everything is valid when not given.

        Returns:
            Rows of text between an image and its compression tokens, such as a line break, are part
            of its block.

        Raises:
            UnsupportedInputError: when compression tokens stand before rows of their image, belong
                to none, or images lie inside each other.
        """
        valid = torch.ones_like(voco) if valid is None else valid.bool()
        image = image * valid
        number = torch.zeros_like(image)
        place = torch.arange(image.shape[1], device=image.device).expand(image.shape)
        for i in range(1, int(image.max()) + 1 if image.numel() else 1):
            own = image == i
            first = place.masked_fill(~own, image.shape[1]).amin(1, keepdim=True)
            last = place.masked_fill(~own, -1).amax(1, keepdim=True)
            inside = (place >= first) & (place <= last)
            if bool((inside & (image != 0) & ~own).any()):
                raise UnsupportedInputError(
                    f"Rows of image {i} and of another lie between each other; place each image's "
                    "compression tokens right behind it."
                )
            number = torch.where(inside, i, number)
        blocks = cls(number, voco.bool() & valid, valid)
        blocks._check(image)
        return blocks

    @classmethod
    def released(cls, voco: Tensor, valid: Tensor | None = None) -> Blocks:
        """Blocks as the released code has them: one, of all rows up to the last compression token.

        So whatever stands before the image, the begin of the sequence above all, is not seen by the
        text either; and of several images the text sees all but the first, which is why `of` is
        used for those.

        Args:
            voco: [B, L] bool, rows that compress.
            valid: [B, L] bool, false where padded; everything is valid when not given.
        """
        valid = torch.ones_like(voco) if valid is None else valid.bool()
        after = voco.long().flip(1).cumsum(1).flip(1) > 0  # a compression token here or later
        return cls(after.long(), voco.bool() & valid, valid)

    def visible(self) -> Tensor:
        """[B, 1, L, L] bool, which rows may attend to which, order and padding aside."""
        same = self.number[:, :, None] == self.number[:, None]
        summary = (self.number == 0)[:, :, None] & self.voco[:, None]
        return (same | summary)[:, None]

    def allowed(self) -> Tensor:
        """[B, 1, L, L] bool, which rows attend to which in a causal LLM.

        Padded rows see themselves, so that no softmax is empty.
        """
        length = self.number.shape[1]
        order = torch.ones(length, length, dtype=torch.bool, device=self.number.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=self.number.device)
        seen = order & self.visible() & self.valid[:, None, None]
        return seen | itself

    def kept(self) -> Tensor:
        """[B, L] bool, rows that text still needs when the blocks have been worked on."""
        return self.valid & ((self.number == 0) | self.voco)

    def positions(self) -> Tensor:
        """[B, L] position ids, which count valid rows; those of dropped rows are not used again."""
        return (self.valid.long().cumsum(1) - 1).clamp(min=0)

    def _check(self, image: Tensor) -> None:
        """Every compression token has an image and stands behind it."""
        if bool((self.voco & (image == 0)).any()):
            raise UnsupportedInputError("A compression token belongs to no image.")
        before = self.voco[:, :-1] & (self.number[:, :-1] == self.number[:, 1:])
        if bool((before & ~self.voco[:, 1:]).any()):
            raise UnsupportedInputError(
                "Rows of an image stand behind its compression tokens, which would not see them; "
                "place these last."
            )
