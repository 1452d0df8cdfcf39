"""The losses: words for patches, labels for [CLS], attention on objects, answers, captions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import Packed
from .codes import Codes
from .labels import BLANK, CLS_LABELS, PAIRS
from .scenes import OBJECT_SHARE

_EOS_WEIGHT = 0.1
_EPSILON = 1e-6


def _pick(labels: Tensor, kept: Tensor) -> Tensor:
    """Rows of ``[b, 196, ...]`` labels at kept patches ``[b, m]``."""
    index = kept.reshape(*kept.shape, *[1] * (labels.ndim - 2))
    return labels.gather(1, index.expand(*kept.shape, *labels.shape[2:]))


def kept_labels(labels: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """Patch labels at the kept patches; labels of the whole image stay."""
    return {k: v if k == "present" else _pick(v, kept) for k, v in labels.items()}


def word_losses(
    tokens: Tensor, embedding: Tensor, codes: Codes, labels: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense word alignment of projected tokens ``[b, m, width]`` with what their patches show.

    Returns:
        Losses, and accuracies by attribute (on patches covered by half).
    """
    on, tokens = labels["item"] >= 0, tokens.float()
    sure = on & (labels["share"] > 0.5)
    losses, accuracy = {}, {}
    for kind in ("colour", "shape", "glyph"):
        logits = codes.logits(tokens, embedding, kind)
        truth = labels[kind].clamp(min=0)
        if kind == "colour":
            truth = torch.where(on, truth, logits.shape[-1] - 1)
        each = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
        shown = labels[kind] >= 0
        weight = (shown.float() if kind != "colour" else torch.where(on, 1.0, 0.3)).flatten()
        if kind == "glyph":  # most objects are blank
            weight = weight * torch.where(truth.flatten() < BLANK, 1.0, 0.3)
        losses[kind] = (each * weight).sum() / weight.sum().clamp(min=1)
        right = (logits.argmax(-1) == truth)[sure & shown & ((truth < BLANK) | (kind != "glyph"))]
        accuracy[kind] = right.float().mean()
    target = codes.encode(
        embedding,
        labels["where"],
        labels["centre"].float(),
        {
            "colour": _hot(labels["colour"], 8),
            "shape": _hot(labels["shape"], 6),
            "glyph": _hot(labels["glyph"], BLANK + 1),
        },
        (~on).float(),
    )
    weight = torch.where(on, 1.0, 0.3)[..., None]
    losses["code"] = ((tokens - target).square() * weight).mean() / weight.mean()
    return losses, accuracy


def _hot(labels: Tensor, classes: int) -> Tensor:
    hot = F.one_hot(labels.clamp(min=0), classes).float()
    return hot * (labels >= 0)[..., None]


def place_loss(tokens: Tensor, head: nn.Linear, labels: dict[str, Tensor]) -> Tensor:
    """Centre regression and centre flag, read linearly from the tokens."""
    read = head(tokens).float()
    on = labels["item"] >= 0
    place = (read[..., :2] - labels["where"]).abs().sum(-1)[on].mean()
    flag = F.binary_cross_entropy_with_logits(read[..., 2], labels["centre"].float())
    return place + flag


def present_loss(cls: Tensor, head: nn.Module, present: Tensor) -> tuple[Tensor, Tensor]:
    """Multi-label loss of a [CLS] state, and its recall of colour and shape pairs."""
    logits = head(cls).float()
    loss = F.binary_cross_entropy_with_logits(logits, present, reduction="none").sum(-1).mean()
    found = (logits > 0) & (present > 0)
    recall = found[:, :PAIRS].sum() / present[:, :PAIRS].sum()
    return loss / CLS_LABELS * 10, recall


def attention_loss(attention: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of [CLS] attention ``[b, 1 + m]`` with the wanted distribution ``[b, m]``.

    It falls with the log of the mass on objects, and asks for the same part on every object.
    """
    target = target / target.sum(1, keepdim=True)
    return -(target * (attention[:, 1:] + _EPSILON).log()).sum(1).mean()


def object_mass(attention: Tensor, share: Tensor) -> Tensor:
    """Share of [CLS] attention ``[b, 1 + m]`` that lies on object patches, mean over images."""
    return (attention[:, 1:] * (share >= OBJECT_SHARE)).sum(1).mean()


def _look_there(looks: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of attention ``[n, k]`` with wanted places ``[n, k]``; empty rows are left out.

    Args:
        looks: attention to the image tokens.
        target: non-negative weights of the places.
    """
    mass = target.sum(1, keepdim=True)
    there = mass[:, 0] > 0
    each = -(target / mass.clamp(min=_EPSILON) * (looks + 1e-4).log()).sum(1)
    return (each * there).sum() / there.sum().clamp(min=1)


def answer_pointing_loss(looks: Tensor, packed: Packed, kept: Tensor) -> Tensor:
    """Where the answering tokens look ``[b, t, k]``, against where the asked objects are."""
    row = packed.answer.nonzero()[:, 0]
    target = packed.asked[row, packed.slot[packed.answer]].gather(1, kept[row])
    return _look_there(looks[packed.answer], target)


def word_pointing_loss(
    looks: Tensor, packed: Packed, labels: dict[str, Tensor], codes: Codes
) -> Tensor:
    """Where colour and shape words look ``[b, t, k]``, against the patches that show them.

    Args:
        looks: attention of the question tokens to the kept patches.
        packed: the questions.
        labels: of the kept patches, ``[b, k]`` each.
        codes: knows the words' ids.
    """
    total = looks.new_zeros(())
    for kind in ("colour", "shape"):
        named = packed.ids[..., None] == codes.ids[kind].to(packed.ids.device)
        row, token, word = named.nonzero(as_tuple=True)
        target = (labels[kind][row] == word[:, None]).float()
        total = total + _look_there(looks[row, token], target)
    return total


def answer_loss(logits: Tensor, target: Tensor, packed: Packed) -> Tensor:
    """Cross entropy of answers and of the ends that follow them."""
    wanted = packed.target != -100
    weight = torch.where(packed.answer[wanted], 1.0, _EOS_WEIGHT)
    return (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
