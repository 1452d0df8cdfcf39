"""Methods that drop nothing inside the language model, written out row by row on unpatched models.

Slow and plain, without a line of the library: VAR as loops in place of the eager kernel, routed
layers as hooks that let rows pass by, and an early exit as a model whose later layers add nothing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def placeholders(model: Any, call: Mapping[str, Tensor]) -> Tensor:
    """[n] columns of the visual tokens of a single prompt."""
    return (call["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]


def absent(model: Any, call: Mapping[str, Tensor], record: Any) -> dict[int, Tensor]:
    """Per layer [1, L] bool, visual columns of a single prompt that it did not work on."""
    columns, out = placeholders(model, call), {}
    for layer, entrants in enumerate(record.layer_entrants):
        there = entrants[0][entrants[0] >= 0]
        out[layer] = torch.zeros_like(call["input_ids"], dtype=torch.bool)
        out[layer][0, columns] = True
        out[layer][0, columns[there]] = False
    return out


class PlainVAR:
    """Visual attention redistribution of single prompts, in a model with eager attention.

    Args:
        model: the model.
        layers: whose attention is edited.
        tau, rho, summ, p: as published.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        tau: float = 2.0,
        rho: float = 0.5,
        summ: float = 0.2,
        p: float = 0.6,
    ) -> None:
        self.model, self.layers = model, layers
        self.tau, self.rho, self.summ, self.p = tau, rho, summ, p
        self.edited = 0
        self._sinks: list[int] = []
        self._visual: list[int] = []
        self._absent: Mapping[int, Tensor] = {}

    def logits(self, call: Mapping[str, Tensor], absent: Mapping[int, Tensor] = {}) -> Tensor:
        """Logits of a prompt; columns absent[layer] ([1, L] bool) do not exist in that layer."""
        self._visual, self._absent = placeholders(self.model, call).tolist(), absent
        with self._in_place():
            logits: Tensor = self.model(**call).logits
        return logits

    def greedy(self, call: Mapping[str, Tensor], steps: int, never: Sequence[int]) -> list[int]:
        """Ids that follow, each one from a forward over everything before it."""
        call, found = dict(call), []
        for _ in range(steps):
            logits = self.logits(call)[0, -1]
            logits[list(never)] = -torch.inf
            found.append(int(logits.argmax()))
            for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
                if name in call:
                    last = found[-1] if name == "input_ids" else int(name == "attention_mask")
                    call[name] = torch.cat([call[name], torch.tensor([[last]])], 1)
        return found

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        layers = self.model.get_decoder().layers
        module: Any = sys.modules[type(layers[0].self_attn).__module__]
        own = module.eager_attention_forward
        numbers = {layer.self_attn: i for i, layer in enumerate(layers)}
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, i=i: self._look(i, args[0]))
            for i, layer in enumerate(layers)
        ]

        def attention(asking: Any, q: Any, k: Any, v: Any, attention_mask: Any, **more: Any) -> Any:
            layer = numbers.get(asking)
            if layer not in self.layers:
                return own(asking, q, k, v, attention_mask, **more)
            return self._attend(layer, q, k, v, attention_mask, more["scaling"]), None

        module.eager_attention_forward = attention
        try:
            yield
        finally:
            module.eager_attention_forward = own
            for hook in hooks:
                hook.remove()

    def _gone(self, layer: int, column: int) -> bool:
        return layer in self._absent and bool(self._absent[layer][0, column])

    def _look(self, layer: int, hidden: Tensor) -> None:
        rows = [row / row.pow(2).mean().sqrt() for row in hidden[0].double()]
        there = [c for c in range(len(rows)) if not self._gone(layer, c)]
        massive = [d for d, x in enumerate(rows[there[0]].tolist()) if abs(x) > self.tau]
        self._sinks = [c for c in there if any(abs(float(rows[c][d])) > self.tau for d in massive)]

    def _attend(self, layer: int, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> Tensor:
        heads, length = q.shape[1:3]
        out = torch.zeros(1, length, heads, v.shape[3])
        visual = [c for c in self._visual if not self._gone(layer, c)]
        for h in range(heads):
            keys, values = (x[0, h * x.shape[1] // heads].double() for x in (k, v))
            for row in range(length):
                logits = keys @ q[0, h, row].double() * scaling
                if mask is not None:
                    logits = logits + mask[0, 0, row].double()
                weights = logits.softmax(0)
                if row not in self._visual and any(c < row for c in self._visual):
                    weights = self._redistributed(weights, visual)
                out[0, row, h] = (weights @ values).float()
        return out

    def _redistributed(self, weights: Tensor, visual: Sequence[int]) -> Tensor:
        image = sum(float(weights[c]) for c in visual)
        wasted = sum(float(weights[c]) for c in visual if c in self._sinks)
        if image < self.summ or wasted / (image + 1e-6 * len(visual)) > self.rho:
            return weights
        freed = sum((1 - self.p) * float(weights[c]) for c in self._sinks)
        new = weights.clone()
        for c in self._sinks:
            new[c] = self.p * weights[c]
        for c in visual:
            if c not in self._sinks:
                new[c] = weights[c] + freed * weights[c] / (image - wasted)
        self.edited += int(freed > 0)
        return new


@contextmanager
def routed(
    model: Any,
    call: Mapping[str, Tensor],
    weights: Mapping[int, Tensor],
    share: float,
    per_image: int,
) -> Iterator[None]:
    """Layers that most visual tokens of a single prompt pass by, by hooks on whole layers.

    Args:
        model: unpatched, with a kernel that takes boolean masks.
        call: the prompt.
        weights: {layer: [d] router}.
        share: of each image that is worked on.
        per_image: visual tokens of an image.
    """
    images = [part.tolist() for part in placeholders(model, call).split(per_image)]
    hooks = []

    def hook(index: int, layer: Any) -> None:
        chosen: dict[int, float] = {}

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            chosen.clear()
            for image in images:
                scored = {c: float(args[0][0, c] @ weights[index]) for c in image}
                k = max(1, int(share * len(image) + 0.5))
                chosen.update(sorted(scored.items(), key=lambda item: (-item[1], item[0]))[:k])
            passing = [c for image in images for c in image if c not in chosen]
            hidden = torch.zeros(args[0].shape[1], dtype=torch.bool)
            hidden[passing] = True
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()[None, None]
            mask = mask & (~hidden | torch.eye(len(hidden), dtype=torch.bool))
            return args, {**kwargs, "attention_mask": mask}

        def after(module: Any, args: Any, output: Tensor) -> Tensor:
            new = output.clone()
            for image in images:
                for c in image:
                    update = output[0, c] - args[0][0, c]
                    new[0, c] = args[0][0, c] + chosen.get(c, 0.0) * update
            return new

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after))

    for index in weights:
        hook(index, model.get_decoder().layers[index])
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def checkpoint(model: Any, on: bool) -> None:
    """Switch activation checkpointing, by its newer name where there is one."""
    name = "enable" if on else "disable"
    new = getattr(model, f"activation_checkpointing_{name}", None)
    (new or getattr(model, f"gradient_checkpointing_{name}"))()


def ending(model: Any, layers: Any, last: int, adding: Sequence[str]) -> Any:
    """A copy of a model in which layers behind `last` add nothing to what comes into them.

    Args:
        model: unpatched.
        layers: finds the layers in a model.
        last: the last one that adds something.
        adding: names of the projections whose output is added.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(model)[last + 1 :]:
            for name in adding:
                projection = layer.get_submodule(name)
                projection.weight.zero_()
                if projection.bias is not None:
                    projection.bias.zero_()
    return model
