"""The question as the model's own language model reads it, for methods that ask for its vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmcompress.core.errors import MissingTextError
from vlmcompress.live import layers
from vlmcompress.methods.prompt.quecc import last_states


@dataclass(frozen=True)
class QuestionReader:
    """Runs texts through a language model.

    Attributes:
        model: the outer model.
        tokenizer: makes ids of a text.
    """

    model: Any
    tokenizer: Any

    @classmethod
    def of(cls, model: Any, processor: Any) -> QuestionReader:
        """The reader of a model.

        Raises:
            MissingTextError: without a processor, by whose tokenizer texts become ids.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        if not callable(tokenizer):
            raise MissingTextError(
                "The method lets the language model read the question: pass patch(..., "
                "processor=processor), whose tokenizer makes ids of it."
            )
        return cls(model, tokenizer)

    @torch.no_grad()
    def vectors(self, texts: Sequence[str]) -> Tensor:
        """[texts, d] the last hidden state of the last token of each text, read by itself.

        All of them go through in one batch, without a cache and outside whatever else is done to
        the layers. Padding stands on the right, where causal rows before it do not see it.
        """
        rows = [list(self.tokenizer(text)["input_ids"]) for text in texts]
        longest = max(1, *map(len, rows))
        decoder = self.model.get_decoder()
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)
        with layers.apart():
            out = decoder(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)
        return last_states(out.last_hidden_state, mask)
