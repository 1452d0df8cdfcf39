"""The two halves of the floor: the tower alone, and the prefill of a short prompt alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eval_harness.clock import Clock
from eval_harness.stages import Parts


def tower_alone(model: Any, inputs: Mapping[str, Tensor], clock: Clock) -> float:
    """Seconds of `get_image_features`: all tower layers and the connector on all patches.

    Args:
        model: unpatched, or inside `handle.disabled()`.
        inputs: of a prompt with an image.
        clock: of the model's device.
    """
    function = model.get_image_features
    names = set(inspect.signature(function).parameters) & set(inputs)
    given = {name: inputs[name] for name in names - {"input_ids", "attention_mask"}}
    with torch.no_grad():
        return clock.time(lambda: function(**given))


def prefill_alone(parts: Parts, embeddings: Tensor, clock: Clock) -> float:
    """Seconds of the language model and its head on an embedded prompt ([B, L, d])."""

    def call() -> None:
        hidden = parts.language_model(inputs_embeds=embeddings, use_cache=True)[0]
        parts.head(hidden[:, -1:])

    with torch.no_grad():
        return clock.time(call)
