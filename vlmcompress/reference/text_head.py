"""The CLIP text head: phrases and captions in one space with patches and images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast

from vlmcompress.core.extras import require

from .model import Shape, text_config
from .questions import PHRASES
from .scenes import OBJECT_SHARE, Drawn
from .tokenizer import EOS

_PAIR_FORMS = (
    "{p}",
    "{a} {p}",
    "the {p}",
    "Is there {a} {p}?",
    *(form.replace("{pair}", "{p}") for key in ("quadrant", "glyph") for form in PHRASES[key]),
)
_COLOUR_FORMS = ("{p}", "the {p} object", *(f.replace("{v}", "{p}") for f in PHRASES["shape"]))
_SHAPE_FORMS = ("{p}", "the {p}", *(f.replace("{v}", "{p}") for f in PHRASES["colour"]))


class TextHead(nn.Module):
    """A CLIP text model and the projection that brings the tower's states to its space.

    The relevance of a patch to a text is the cosine of ``embed_patches`` (from the tower's hidden
    state -2) with ``text.text_embeds``.
    """

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        shape = shape or Shape()
        self.text = CLIPTextModelWithProjection(text_config(shape))
        self.visual_projection = nn.Linear(shape.width, shape.text_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))

    def embed_texts(self, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
        """Unit text embeddings ``[texts, d]``; each text is closed by <eos>."""
        ids = [tokenizer.encode(text + EOS)[:96] for text in texts]
        longest = max(len(row) for row in ids)
        padded = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids]
        device = self.logit_scale.device
        return F.normalize(self.text(torch.tensor(padded, device=device)).text_embeds, dim=-1)

    def embed_patches(self, hidden: Tensor, post_layernorm: nn.Module) -> Tensor:
        """Unit embeddings ``[..., d]`` of tower states: patches of layer -2, [CLS] of layer -1."""
        return F.normalize(self.visual_projection(post_layernorm(hidden)), dim=-1)

    def save(self, folder: Path) -> None:
        """Write the text model and the projection (safetensors and json)."""
        from safetensors.torch import save_file

        self.text.save_pretrained(folder)
        projection = {
            "visual_projection.weight": self.visual_projection.weight.detach().contiguous(),
            "logit_scale": self.logit_scale.detach(),
        }
        save_file(projection, str(folder / "projection.safetensors"))

    @classmethod
    def load(cls, folder: Path) -> TextHead:
        """Read what `save` wrote, in evaluation mode and float32."""
        from safetensors.torch import load_file

        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.text = CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32)
        saved = load_file(str(folder / "projection.safetensors"))
        weight = saved["visual_projection.weight"].float()
        head.visual_projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        head.visual_projection.weight.data = weight
        head.logit_scale = nn.Parameter(saved["logit_scale"].float())
        return head.eval()


@dataclass(frozen=True)
class Phrases:
    """Texts and the patches ``[texts, b * m]`` that each is about."""

    texts: list[str]
    weight: Tensor


def _form(rng: np.random.Generator, forms: tuple[str, ...], words: str) -> str:
    article = "an" if words.startswith("orange") else "a"
    return forms[rng.integers(len(forms))].format(p=words, a=article)


def _phrases(scenes: list[Drawn], kept: np.ndarray, rng: np.random.Generator) -> list[Phrases]:
    """Pairs, colours and shapes of a batch, each named once, with the patches that show them."""
    tables: list[dict[str, np.ndarray]] = [{}, {}, {}]
    size = kept.size
    for b, drawn in enumerate(scenes):
        for item in drawn.items:
            shares = item.coverage[kept[b]]
            shares = shares * (shares >= OBJECT_SHARE)
            for table, words in zip(
                tables, (" ".join(item.pair), item.colour, item.shape), strict=True
            ):
                row = table.setdefault(words, np.zeros(size, np.float32))
                row[b * kept.shape[1] : (b + 1) * kept.shape[1]] += shares
    found = []
    for table, forms in zip(tables, (_PAIR_FORMS, _COLOUR_FORMS, _SHAPE_FORMS), strict=True):
        shown = {words: row for words, row in table.items() if row.sum() > 0}
        texts = [_form(rng, forms, words) for words in shown]
        found.append(Phrases(texts, torch.from_numpy(np.stack(list(shown.values())))))
    empty = np.concatenate([d.coverage[k] < 0.01 for d, k in zip(scenes, kept, strict=True)])
    if empty.any():  # the ground is one more thing that a text can name
        pairs = found[0]
        ground = torch.from_numpy(empty.astype(np.float32))[None]
        found[0] = Phrases([*pairs.texts, "the ground"], torch.cat([pairs.weight, ground]))
    return found


def caption(drawn: Drawn, rng: np.random.Generator) -> str:
    """A caption that lists every object."""
    pairs = dict.fromkeys(drawn.items[i].pair for i in rng.permutation(len(drawn.items)))
    names = [" ".join(pair) for pair in pairs]
    return "a " + ", ".join(names)


def contrastive_loss(
    head: TextHead,
    tokenizer: PreTrainedTokenizerFast,
    patches: Tensor,
    cls: Tensor,
    scenes: list[Drawn],
    kept: Tensor,
    rng: np.random.Generator,
) -> Tensor:
    """open_clip's contrastive loss, between texts and pooled patches and captions and images.

    Args:
        head: the text head.
        tokenizer: of the model.
        patches: ``[b, m, d]`` unit patch embeddings.
        cls: ``[b, d]`` unit image embeddings.
        scenes: of the batch.
        kept: ``[b, m]`` patch indices.
        rng: source of randomness.
    """
    loss = require("open_clip").ClipLoss()
    groups = _phrases(scenes, kept.cpu().numpy(), rng)
    captions = [caption(drawn, rng) for drawn in scenes]
    texts = [text for group in groups for text in group.texts]
    embedded = head.embed_texts([*texts, *captions], tokenizer)
    flat, scale = patches.flatten(0, 1).float(), head.logit_scale.exp().clamp(max=100)
    total, start = torch.zeros((), device=cls.device), 0
    for group in groups:
        weight = group.weight.to(flat.device)
        pooled = F.normalize(weight @ flat / weight.sum(1, keepdim=True), dim=-1)
        stop = start + len(group.texts)
        total = total + loss(pooled, embedded[start:stop].float(), scale)
        start = stop
    return total + loss(cls.float(), embedded[start:].float(), scale)
