"""BUS: patches that the question is about, summed up by a decoder (arXiv 2307.08504, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from vlmcompress.core.errors import ConfigError, ConfigTypeError, MissingTextError
from vlmcompress.core.tokens import VisualTokens
from vlmcompress.methods.base import Needs
from vlmcompress.methods.learned import Learned, fresh, required
from vlmcompress.methods.ops.queries import head_count
from vlmcompress.methods.ops.topk import top_k
from vlmcompress.methods.options import check_count, check_number
from vlmcompress.methods.trained import ConnectorShape, LearnedCompressor


@dataclass(frozen=True)
class BUS(LearnedCompressor):
    """Bottom-up summary: a selector extracts patches by the question, a decoder abstracts them.

    The selector (TSPS) reads each patch beside the embedding of the question and says how well they
    match; the share `extracted` with the best scores stays. Of these, the k best ask all that were
    extracted, through blocks of self attention, cross attention and a perceptron (PAD). Each row is
    thus a patch that has taken up what belongs to it, stands at that patch's place, and counts for
    the extracted patches that it attends to most.

    `matching_loss` trains the selector on patches that are known to show what a text says (the
    paper's patch-text matching); the loss of the model's answers reaches it too, straight through
    the choice.

    The paper has the selector between blocks of the tower, in models trained from nothing, and its
    text is that model's; here it stands behind a trained tower and reads the question as CLIP
    embeds it (`patch(clip=...)`), a long one as the mean of its parts. Selector and decoder follow
    the paper's outline; that the decoder's queries are the best patches is this library's choice,
    and what the decoder adds starts at zero. The authors have published no code.

    Attributes:
        extracted: share of the patches that the decoder sees, never less than k of them.
        depth: blocks of the decoder.
        text_width: of CLIP's embeddings: 768 for ViT-L/14, 512 for ViT-B.
        head_width: channels per head of attention, at least.
    """

    name: ClassVar[str] = "bus"
    paper: ClassVar[str] = "https://arxiv.org/abs/2307.08504"
    extracted: float = 0.5
    depth: int = 2
    text_width: int = 768
    head_width: int = 64

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_number(self.name, "extracted", self.extracted, 0, 1)
        for option in ("depth", "text_width", "head_width"):
            check_count(self.name, option, getattr(self, option))

    def needs(self) -> Needs:
        """The question."""
        return Needs(text=True)

    def parts(self, shape: ConnectorShape) -> Summary:
        """Selector and decoder."""
        heads = head_count(shape.width, self.head_width)
        return fresh(
            lambda: Summary(shape.width, self.text_width, self.depth, heads),
            self.seed,
            self.weights,
        )

    def compress(self, tokens: VisualTokens, keep: float | int) -> VisualTokens:
        """The k patches that match best, with what the others extracted add to them.

        Raises:
            MissingTextError: without a question.
            ConfigError: when its embedding has another width than `text_width`.
            EvidenceError: without trained parts.
        """
        if tokens.evidence.text is None:
            raise MissingTextError("bus extracts patches by the question, and none was given.")
        summary = required(tokens.parts, Summary, "connector")
        k = self.budget(tokens, keep)
        m = max(k, int(tokens.n * self.extracted + 0.5))
        with torch.autocast(tokens.features.device.type, enabled=False):
            made, source, extracted, owner = summary(tokens.features, tokens.evidence.text, k, m)
        moved = torch.full_like(tokens.index, -1).scatter(1, extracted, owner)
        return tokens.regroup(made.to(tokens.features.dtype), source, moved)


class Summary(Learned):
    """Selector and decoder.

    Args:
        width: of the tower's states.
        text: width of the question's embedding.
        depth: blocks of the decoder.
        heads: of attention.
    """

    def __init__(self, width: int, text: int, depth: int, heads: int) -> None:
        super().__init__(method="bus", width=width, text=text, depth=depth, heads=heads)
        self.norm = nn.LayerNorm(width)
        self.about = nn.Linear(text, width)
        self.match = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))
        self.blocks = nn.ModuleList([Abstraction(width, heads) for _ in range(depth)])

    def logits(self, x: Tensor, text: Tensor) -> Tensor:
        """How well patches match the question, before the sigmoid: [b, n] float32.

        Args:
            x: [b, n, width] patches.
            text: [b, m, e] embeddings of the parts of the question; rows of zeros fill up.

        Raises:
            ConfigError: for embeddings of another width.
        """
        if text.shape[-1] != self.config["text"]:
            raise ConfigError(
                f"The question's embedding has {text.shape[-1]} channels, and bus was made for "
                f"{self.config['text']}; use bus(text_width={text.shape[-1]})."
            )
        parts = (text != 0).any(2).sum(1).clamp(min=1)
        mean = normalize(text.float(), dim=-1).sum(1) / parts[:, None]
        asked = self.about(mean)[:, None].expand(-1, x.shape[1], -1)
        matched: Tensor = self.match(torch.cat([self.norm(x.float()), asked], -1))
        return matched[..., 0]

    def forward(self, x: Tensor, text: Tensor, k: int, m: int) -> tuple[Tensor, ...]:
        """Rows and what they are made of.

        Args:
            x: [b, n, width] patches.
            text: as for `logits`.
            k: rows.
            m: patches that are extracted, at least k.

        Returns:
            [b, k, width] float32 rows in the order of their places, [b, k] these places,
            [b, m] the patches extracted, [b, m] the row that each counts for.
        """
        scores = self.logits(x, text).sigmoid()
        extracted, best = top_k(scores.detach(), m), top_k(scores.detach(), k)
        # Nothing is added but the scores' gradient.
        x = x.float() + x.float() * (scores - scores.detach())[..., None]
        rows, seen = (_gather(x, index) for index in (best, extracted))
        for block in self.blocks:
            rows, weights = block(rows, seen)
        own = torch.arange(k, device=x.device).expand_as(best)
        owner = torch.full(x.shape[:2], -1, device=x.device)
        owner = owner.scatter(1, extracted, weights.detach().argmax(1)).scatter(1, best, own)
        return rows, best, extracted, owner.gather(1, extracted)


class Abstraction(nn.Module):
    """A block of the decoder, which adds nothing until it is trained.

    Args:
        width: of the rows.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])
        self.own = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for last in (self.own.out_proj, self.cross.out_proj, self.down):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """[b, k, width] rows and [b, k, m], what of `seen` ([b, m, width]) they attended to."""
        normed = self.norms[0](rows)
        rows = rows + self.own(normed, normed, normed, need_weights=False)[0]
        keys = self.norms[1](seen)
        mixed, weights = self.cross(self.norms[2](rows), keys, keys)
        rows = rows + mixed
        return rows + self.down(nn.functional.gelu(self.up(self.norms[3](rows)))), weights


def matching_loss(parts: Learned | None, x: Tensor, text: Tensor, inside: Tensor) -> Tensor:
    """Patch-text matching: cross entropy of the selector on patches that show what a text says.

    Args:
        parts: of `bus`, as `handle.parts`.
        x: [b, n, width] patches as they leave the tower.
        text: [b, m, e] embeddings of the texts, as the method reads those of questions.
        inside: [b, n] true, or the share of the patch, where it shows what the text says.

    Raises:
        ConfigTypeError: for parts of another method.
    """
    if not isinstance(parts, Summary):
        raise ConfigTypeError(
            f"Patches are matched by parts of 'bus', not by {type(parts).__name__}; pass "
            "handle.parts of a model patched with it."
        )
    return binary_cross_entropy_with_logits(parts.logits(x, text), inside.float())


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` ([b, k]) of [b, n, d]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
