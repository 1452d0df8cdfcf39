"""A padded batch is its samples: each row answers as it does alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.seam import oracle


def singles(model: Any, call: dict[str, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Number and inputs of each row by itself."""
    for b in range(len(call["input_ids"])):
        per_image = tiny.tokens_per_image(model)
        yield b, oracle.row(call, b, model.config.image_token_id, per_image)


def check_answers(model: Any, call: dict[str, Tensor], **options: Any) -> None:
    """Greedy answers, or those of beams, are those of the rows alone."""
    options = {**oracle.greedy(model), **options}
    batch = model.generate(**call, **options)
    for b, alone in singles(model, call):
        ids = model.generate(**alone, **options)
        new = ids.shape[1] - alone["input_ids"].shape[1]
        assert torch.equal(batch[b, -new:], ids[0, -new:]), b


def check_logits(model: Any, call: dict[str, Tensor], **options: Any) -> None:
    """Logits are those of the rows alone, wherever a row is not padding."""
    together = model(**call, **options).logits
    for b, single in singles(model, call):
        alone = model(**single, **options).logits[0]
        rows = call["attention_mask"][b].bool()
        torch.testing.assert_close(together[b][rows], alone, atol=2e-5, rtol=0)
