"""Everything that training moves, and its memory of what it finds hard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from .codes import Codes
from .labels import CLS_LABELS
from .model import Shape, build_model
from .text_head import TextHead
from .worlds import ALL_KINDS, chance

CLS_LAYERS = (-4, -3, -2, -1)
_CHANCE = np.array([chance(kind) for kind in ALL_KINDS])


class Trainee(nn.Module):
    """The model, its text head, and the heads that only training needs."""

    def __init__(self, shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        super().__init__()
        self.model = build_model(shape, seed)
        self.model.set_attn_implementation("eager")  # the fused backward is slow on CPUs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.text_head = TextHead(shape)
            self.text_head.text.set_attn_implementation("eager")
            self.present = nn.ModuleDict(
                {
                    str(i): nn.Sequential(
                        nn.LayerNorm(shape.width), nn.Linear(shape.width, CLS_LABELS)
                    )
                    for i in CLS_LAYERS
                }
            )
            self.place = nn.Linear(shape.width, 3)
        self.codes = Codes(tokenizer, shape.width)

    @property
    def embedding(self) -> Tensor:
        """The word embedding, ``[vocabulary, width]``."""
        table: Any = self.model.get_input_embeddings()
        return table.weight


@dataclass
class Mix:
    """Accuracy per kind, and from it how often each kind is asked: stuck kinds more often."""

    accuracy: np.ndarray = field(default_factory=_CHANCE.copy)

    def update(self, right: np.ndarray, asked: np.ndarray) -> None:
        """Take in the counts of one step."""
        seen = asked > 0
        rate = np.minimum(0.1, 0.004 * asked[seen])
        self.accuracy[seen] += rate * (right[seen] / asked[seen] - self.accuracy[seen])

    def needs(self) -> np.ndarray:
        """``[11]`` how often to ask each kind, in relation to the others of its world."""
        return np.clip((1 - self.accuracy) / (1 - _CHANCE), 0.07, 1)
