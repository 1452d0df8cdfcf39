"""CLIP models that embed questions and patches in one space, for methods that read the question.

Vision-language checkpoints hold the vision half of a CLIP model at most, so the text half is an
argument of `patch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from vlmcompress.core.errors import ConfigTypeError, MissingTextError


class TextSource(Protocol):
    """What embeds texts and patches in one space."""

    @property
    def width(self) -> int:
        """Of the tower's states that `patches` takes."""

    def texts(self, texts: Sequence[str]) -> list[Tensor]:
        """[m, e] per text: an embedding of each part of it, float32."""

    def patches(self, states: Tensor) -> Tensor:
        """[..., e] float32 of the tower's states that the connector reads ([..., width])."""


Embed: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClipSource:
    """A text encoder with the head of the vision tower.

    Texts that are longer than the encoder's context are cut into parts, each with its own begin and
    end. (CDPruner's released code cuts the ids with begin and end once around all of them, so that
    all parts but the last lack the end whose state is their embedding.)

    Attributes:
        width: of the tower's states.
        tokenize: content ids of a text, without begin and end.
        begin: id at the beginning of every part.
        end: id at the end, by whose state the part is embedded; also fills up.
        context: ids a part may have.
        embed: [k, ids] to [k, e].
        head: states of the tower to embeddings.
        module: whose device and dtype both take.
    """

    width: int
    tokenize: Callable[[str], list[int]]
    begin: int
    end: int
    context: int
    embed: Embed
    head: Embed
    module: nn.Module

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> list[Tensor]:
        """[m, e] per text."""
        room = self.context - 2
        parts, counts = [], []
        for text in texts:
            ids = self.tokenize(text)
            cut = [ids[i : i + room] for i in range(0, max(len(ids), 1), room)]
            parts += [[self.begin, *part, self.end] for part in cut]
            counts.append(len(cut))
        longest = max(map(len, parts))
        rows = [part + [self.end] * (longest - len(part)) for part in parts]
        device = next(self.module.parameters()).device
        with torch.autocast(device.type, enabled=False):
            embedded = self.embed(torch.tensor(rows, device=device)).float()
        return list(embedded.split(counts))

    @torch.no_grad()
    def patches(self, states: Tensor) -> Tensor:
        """[..., e] of the tower's states."""
        weight = next(self.module.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            return self.head(states.to(weight.device, weight.dtype)).float().to(states.device)


@dataclass(frozen=True)
class HeadSource:
    """The reference model's text head beside the tower's own last normalisation."""

    head: Any
    tokenizer: Any
    norm: nn.Module

    @property
    def width(self) -> int:
        """Of the tower's states."""
        return int(self.head.visual_projection.in_features)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> list[Tensor]:
        """[1, e] per text."""
        return list(self.head.embed_texts(list(texts), self.tokenizer).float()[:, None])

    @torch.no_grad()
    def patches(self, states: Tensor) -> Tensor:
        """[..., e] of the tower's states."""
        weight = self.head.visual_projection.weight

        def norm(x: Tensor) -> Tensor:
            return self.norm(x).to(weight.device, weight.dtype)

        return self.head.embed_patches(states, norm).float().to(states.device)


def source_of(clip: Any, processor: Any, tower: nn.Module) -> TextSource | None:
    """What `patch(clip=...)` was given, made ready.

    Args:
        clip: None, a hub id or folder, a transformers `CLIPModel` (or a pair of it and its
            tokenizer), a pair of an open_clip model and its tokenizer, the reference's text head,
            or anything with the methods of `TextSource`.
        processor: of the patched model; the reference's text head shares its tokenizer.
        tower: the patched model's vision tower.

    Raises:
        ConfigTypeError: for anything else.
        MissingTextError: when a tokenizer is missing.
    """
    if clip is None or (hasattr(clip, "texts") and hasattr(clip, "patches")):
        return clip  # type: ignore[no-any-return]
    if isinstance(clip, str):
        from transformers import CLIPModel

        clip = CLIPModel.from_pretrained(clip).eval()
    model, tokenizer = clip if isinstance(clip, tuple) and len(clip) == 2 else (clip, None)
    if hasattr(model, "embed_texts") and hasattr(model, "embed_patches"):
        return _of_head(model, tokenizer or getattr(processor, "tokenizer", None), tower)
    if hasattr(model, "text_model") and hasattr(model, "visual_projection"):
        return _of_transformers(model, tokenizer)
    if hasattr(model, "encode_text") and hasattr(getattr(model, "visual", None), "ln_post"):
        return _of_open_clip(model, tokenizer)
    raise ConfigTypeError(
        f"clip is {type(clip).__name__}; give a hub id, a transformers CLIPModel, "
        "(open_clip model, its tokenizer), or vlmcompress.reference.load_text_head()."
    )


def _of_transformers(model: Any, tokenizer: Any) -> ClipSource:
    if tokenizer is None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        except (OSError, ValueError) as error:
            raise MissingTextError(
                f"No tokenizer found for this CLIPModel ({model.name_or_path!r}); pass "
                "clip=(model, tokenizer)."
            ) from error

    def embed(ids: Tensor) -> Tensor:
        return model.text_projection(model.text_model(input_ids=ids).pooler_output)

    def head(states: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model.post_layernorm(states))

    return ClipSource(
        width=model.config.vision_config.hidden_size,
        tokenize=lambda text: tokenizer(text, add_special_tokens=False).input_ids,
        begin=tokenizer.bos_token_id,
        end=tokenizer.eos_token_id,
        context=model.config.text_config.max_position_embeddings,
        embed=embed,
        head=head,
        module=model,
    )


def _of_open_clip(model: Any, tokenizer: Any) -> ClipSource:
    if tokenizer is None or not hasattr(tokenizer, "sot_token_id"):
        raise MissingTextError(
            "An open_clip model needs its tokenizer: "
            "clip=(model, open_clip.get_tokenizer(name)); one that wraps another library's cannot "
            "be used."
        )

    def embed(ids: Tensor) -> Tensor:
        # Padding is 0 there, and the model wants its whole context.
        ended = (ids == tokenizer.eot_token_id).cumsum(1)
        ids = ids.masked_fill((ended > 1), 0)
        return model.encode_text(nn.functional.pad(ids, (0, model.context_length - ids.shape[1])))

    def head(states: Tensor) -> Tensor:
        return model.visual.ln_post(states) @ model.visual.proj

    return ClipSource(
        width=model.visual.proj.shape[0],
        tokenize=tokenizer.encode,
        begin=tokenizer.sot_token_id,
        end=tokenizer.eot_token_id,
        context=model.context_length,
        embed=embed,
        head=head,
        module=model,
    )


def _of_head(head: Any, tokenizer: Any, tower: nn.Module) -> HeadSource:
    if tokenizer is None:
        raise MissingTextError(
            "The reference's text head shares the model's tokenizer; pass processor=..., or "
            "clip=(head, tokenizer)."
        )
    norms = [m for name, m in tower.named_modules() if name.endswith("post_layernorm")]
    if not norms:
        raise ConfigTypeError(
            f"clip is {type(head).__name__}, which needs the post_layernorm of its tower; "
            f"{type(tower).__name__} has none."
        )
    return HeadSource(head, tokenizer, norms[0])
