"""One pass of the language model over an image and many independent questions about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .batches import IGNORED, Packed
from .scenes import PATCHES
from .tokenizer import SPECIAL, USER


@dataclass(frozen=True)
class Looks:
    """Attention of question tokens to image tokens, ``[b, t, k]``: early layers and middle ones."""

    words: Tensor
    answers: Tensor


def block_mask(block: Tensor, prefix: int) -> Tensor:
    """Who sees whom: the prefix causally, each question the prefix and itself.

    Args:
        block: ``[b, t]`` question numbers.
        prefix: tokens before the questions, the same for every row.

    Returns:
        ``[b, 1, prefix + t, prefix + t]`` float32 to add to the scores.
    """
    b, t = block.shape
    total = prefix + t
    causal = torch.ones(total, total, dtype=torch.bool, device=block.device).tril()
    mask = causal.expand(b, total, total).clone()
    mask[:, prefix:, prefix:] &= block[:, :, None] == block[:, None, :]
    scores = torch.zeros(mask.shape, device=block.device)
    return scores.masked_fill_(~mask, torch.finfo(torch.bfloat16).min)[:, None]


def position_ids(offset: Tensor, kept: Tensor, contiguous: bool) -> Tensor:
    """Positions of the user token, the kept patches and the questions, ``[b, 1 + k + t]``.

    Args:
        offset: ``[b, t]`` place of each token in its question.
        kept: ``[b, k]`` patch indices, increasing.
        contiguous: number the kept patches anew instead of leaving gaps.
    """
    b, k = kept.shape
    ranks = torch.arange(k, device=kept.device).expand(b, k)
    first = torch.zeros_like(kept[:, :1])
    patches = 1 + (ranks if contiguous else kept)
    questions = 1 + (k if contiguous else PATCHES) + offset
    return torch.cat([first, patches, questions], dim=1)


def run_llm(
    model: LlavaForConditionalGeneration,
    tokens: Tensor,
    kept: Tensor,
    packed: Packed,
    contiguous: bool,
) -> tuple[Tensor, Tensor, Looks | None]:
    """Predict every answer.

    Args:
        model: the reference model.
        tokens: image tokens ``[b, k, width]``.
        kept: ``[b, k]`` their patch indices.
        packed: the questions.
        contiguous: see `position_ids`.

    Returns:
        Logits ``[targets, vocabulary]`` float32, target ids ``[targets]``, and where the question
        looks (None without eager attention).
    """
    embed = model.get_input_embeddings()
    user = torch.full_like(kept[:, :1], SPECIAL.index(USER))
    sequence = torch.cat([embed(user), tokens, embed(packed.ids)], dim=1)
    pointing = model.config.get_text_config()._attn_implementation == "eager"
    out = model.model.language_model(
        inputs_embeds=sequence,
        attention_mask=block_mask(packed.block, 1 + kept.shape[1]),
        position_ids=position_ids(packed.offset, kept, contiguous),
        use_cache=False,
        output_attentions=pointing,
    )
    wanted = packed.target != IGNORED
    answers = out.last_hidden_state[:, 1 + kept.shape[1] :][wanted]
    looks = None
    if pointing:
        depth, k = len(out.attentions), kept.shape[1]
        early, middle = depth // 8, depth // 2  # layers 1 and 2, 4 and 5 of eight
        looks = Looks(
            words=looks_at(out.attentions, range(early, max(early + 1, 3 * depth // 8)), k),
            answers=looks_at(out.attentions, range(middle, middle + max(1, depth // 4)), k),
        )
    return model.lm_head(answers).float(), packed.target[wanted], looks


def looks_at(attentions: tuple[Tensor, ...], layers: range, k: int) -> Tensor:
    """How much each question token looks at each image token.

    Args:
        attentions: per layer ``[b, heads, n, n]``.
        layers: those to average over.
        k: number of image tokens.

    Returns:
        ``[b, t, k]`` mean over the layers and the first half of the heads.
    """
    half = attentions[0].shape[1] // 2
    rows = [attentions[i][:, :half, 1 + k :, 1 : 1 + k].float().mean(dim=1) for i in layers]
    return torch.stack(rows).mean(dim=0)


def judge(logits: Tensor, target: Tensor, packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Which questions are answered rightly, every letter of them.

    Args:
        logits: ``[targets, vocabulary]``, of `run_llm`.
        target: ``[targets]`` token ids, of `run_llm`.
        packed: the questions.

    Returns:
        Right or wrong and the index of the kind, one entry per question.
    """
    wanted = packed.target != IGNORED
    answer = packed.answer[wanted]
    right = (logits.argmax(-1) == target)[answer].cpu().numpy()
    row = wanted.nonzero()[:, 0][answer]
    block = packed.block[wanted][answer]
    question = (row * (int(packed.block.max()) + 1) + block).cpu().numpy()
    _, first, member = np.unique(question, return_index=True, return_inverse=True)
    kinds = packed.kind[wanted][answer].cpu().numpy()[first]
    wrong = np.bincount(member, ~right)
    return wrong == 0, kinds
