"""VoCo-LLaMA: text sees the image only through a few tokens of the LLM's own (arXiv 2406.12275).

A prompt is cut into blocks: block 0 is its text, and every image with its compression tokens is a
block of its own. Rows attend inside their block; text attends to the compression tokens of all
blocks besides. What a block's compression tokens leave in the cache is therefore all that is needed
of an image, and does not depend on what is asked about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import CheckpointError, UnsupportedInputError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import FeatureSpace
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.parts import Partition
from vlmcompress.methods.prompt.base import PromptCompressor
from vlmcompress.methods.trained import ConnectorShape

#: Row of the released table of embeddings that belongs to the compression token.
RELEASED_ID = 32000


@dataclass(frozen=True)
class VoCoLLaMA(PromptCompressor):
    """An image becomes what a few tokens of the LLM are in every layer when they have read it.

    The LLM reads each image once, its rows and behind them the compression tokens. In the prompt
    only these stand in the image's place, and in every layer they hold what they held then. Text
    sees them as it would in one long pass under the mask of `Blocks`, in training and inference
    alike and under any kernel, and neither pass has the length of that one. What was read holds for
    every question. (The released code makes the long pass, also at inference, and under
    FlashAttention or eager attention without its mask. In its prompts the begin of the sequence
    stands before the image's rows and a line break behind them, and compression tokens see both;
    here they see the image alone, so that what is read fits every prompt.)

    In the prompt compression tokens stand where the last tokens of the image stood. It needs
    training, the LLM's included: untrained, embeddings are drawn by `seed`.
    """

    name: ClassVar[str] = "voco_llama"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.12275"
    reads: ClassVar[FeatureSpace] = "llm"
    partition: ClassVar[Partition] = Partition(scope="image")

    @property
    def reads_images(self) -> bool:
        """It does."""
        return True

    def parts(self, shape: ConnectorShape) -> VocoTokens:
        """One embedding per compression token."""
        tokens = self.count(shape)
        return fresh(lambda: VocoTokens(tokens, shape.out), self.seed, self.weights)

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """The compression tokens, which are to read the rows that came in.

        Raises:
            ConfigError: when more are asked for than there are embeddings.
        """
        k, (b, n, _) = self.budget(tokens, keep), tokens.features.shape
        parts = required(tokens.parts, VocoTokens, "prompt")
        if k > parts.config["tokens"]:
            raise self.refuse_count(n, k, parts.config["tokens"])
        rows = torch.arange(n, device=tokens.features.device)
        # Those in front are shared out evenly; the last ones stand for themselves.
        moved = torch.where(rows < n - k, rows * k // max(n - k, 1), rows - (n - k))
        made = parts.rows(b, tokens.features.dtype)[:, :k]
        return tokens.regroup(made, rows[n - k :].expand(b, -1), moved.expand(b, -1))


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
