"""One pass of the language model over an image and many independent questions about it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .batches import IGNORED, Packed
from .scenes import PATCHES
from .tokenizer import SPECIAL, USER


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Predict every answer.

    Args:
        model: the reference model.
        tokens: image tokens ``[b, k, width]``.
        kept: ``[b, k]`` their patch indices.
        packed: the questions.
        contiguous: see `position_ids`.

    Returns:
        Logits ``[targets, vocabulary]`` float32, target ids ``[targets]``, and where the answering
        tokens look in the middle layers, ``[questions, k]`` (empty without eager attention).
    """
    embed = model.get_input_embeddings()
    user = torch.full_like(kept[:, :1], SPECIAL.index(USER))
    sequence = torch.cat([embed(user), tokens, embed(packed.ids)], dim=1)
    pointing = model.config.text_config._attn_implementation == "eager"
    out = model.model.language_model(
        inputs_embeds=sequence,
        attention_mask=block_mask(packed.block, 1 + kept.shape[1]),
        position_ids=position_ids(packed.offset, kept, contiguous),
        use_cache=False,
        output_attentions=pointing,
    )
    wanted = packed.target != IGNORED
    answers = out.last_hidden_state[:, 1 + kept.shape[1] :][wanted]
    looks = answers.new_zeros(0)
    if pointing:
        looks = pointers(out.attentions, packed.answer, kept.shape[1])
    return model.lm_head(answers).float(), packed.target[wanted], looks


def pointers(attentions: tuple[Tensor, ...], answering: Tensor, k: int) -> Tensor:
    """Attention of the answering tokens to the image, in the two middle layers.

    Args:
        attentions: per layer ``[b, heads, n, n]``.
        answering: ``[b, t]`` bool, the tokens that predict an answer.
        k: number of image tokens.

    Returns:
        ``[questions, k]`` mean over the layers and the first half of the heads.
    """
    middle = len(attentions) // 2
    rows = []
    for attention in attentions[middle : middle + 2]:
        heads = attention[:, : attention.shape[1] // 2, 1 + k :, 1 : 1 + k]
        rows.append(heads.float().mean(dim=1)[answering])
    return torch.stack(rows).mean(dim=0)
