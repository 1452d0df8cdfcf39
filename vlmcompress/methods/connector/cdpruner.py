"""CDPruner: diverse tokens among those the question is about (arXiv 2506.10967, §3.2-3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmcompress.core.errors import EvidenceError, MissingTextError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import FeatureSpace, Needs, TokenCompressor
from vlmcompress.methods.ops.diversity import cosine, determinantal


@dataclass(frozen=True)
class CDPruner(TokenCompressor):
    """The most probable subset of a determinantal point process conditioned on the question.

    A token's relevance is *minus* the cosine of its CLIP embedding with the question's (mean over
    the parts of a long question), brought to (0, 1] within the image. The sign is the released
    code's: CLIP's dense similarities are inverted. The kernel is the cosine between the tokens the
    LLM receives, times the relevance of both; tokens are picked greedily.

    Two things differ from the released code. It scales relevance over all images and views of a
    call together, so that one image's tokens depend on the others'; `faithful=True` does so for
    images of equal size. And beyond the kernel's rank, where it returns indices twice and so fewer
    tokens than asked for, here the most relevant of the others follow.

    Attributes:
        faithful: whether relevance is scaled over all images of equal size in a call.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.10967"
    reads: ClassVar[FeatureSpace] = "llm"
    faithful: bool = False

    def needs(self) -> Needs:
        """The question, and the tokens in its space."""
        return Needs(text=True)

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """Keep the selected rows, in their original order."""
        k = self.budget(tokens, keep)
        if k >= tokens.n:
            return tokens
        relevance = self.relevance(tokens)
        kernel = cosine(tokens.features.detach())
        kernel.mul_(relevance[:, :, None]).mul_(relevance[:, None])
        return tokens.select(determinantal(kernel, relevance, k).sort(1).values)

    @torch.no_grad()
    def relevance(self, tokens: VisualTokens) -> Tensor:
        """[b, n] in (0, 1]: how little CLIP's dense similarity to the question is."""
        text, patches = tokens.evidence.text, tokens.evidence.patches
        if text is None:
            raise MissingTextError("cdpruner ranks tokens by the question, and none was given.")
        if patches is None:
            raise EvidenceError(
                "cdpruner needs the tokens in the space of the question's embedding."
            )
        parts = (text != 0).any(2).sum(1).clamp(min=1)
        with torch.autocast(text.device.type, enabled=False):
            about, seen = normalize(text.float(), dim=-1), normalize(patches.float(), dim=-1)
            cosines = torch.stack([x @ t.T for x, t in zip(seen, about, strict=True)])
        raw = -cosines.sum(2) / parts[:, None]
        axes = (0, 1) if self.faithful else 1
        low, high = raw.amin(axes, keepdim=True), raw.amax(axes, keepdim=True)
        spread = high - low
        # Where nothing tells tokens apart, all count alike.
        return torch.where(spread > 0, (raw - low + 1e-6) / spread, 1.0)
