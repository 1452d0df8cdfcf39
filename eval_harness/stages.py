"""Where a model's stages begin and end, seen by temporary hooks on its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eval_harness.clock import Clock, Mark
from vlmcompress.core.errors import UnsupportedModelError

_TOWERS = ("vision_tower", "visual", "vision_model")
_CONNECTORS = ("multi_modal_projector", "connector", "merger")


@dataclass(frozen=True)
class Parts:
    """The modules whose time is taken apart.

    Attributes:
        tower: the vision tower.
        connector: what follows it; None where it has no module of its own.
        language_model: without its head.
        head: makes logits.
        nested: whether the connector is a part of the tower, whose time then holds its time.
    """

    tower: nn.Module
    connector: nn.Module | None
    language_model: nn.Module
    head: nn.Module
    nested: bool = False

    def named(self) -> dict[str, nn.Module]:
        """Those that exist, by name."""
        return {name: part for name, part in vars(self).items() if isinstance(part, nn.Module)}


def parts(model: nn.Module) -> Parts:
    """Find tower, connector, language model and head of a transformers VLM.

    Raises:
        UnsupportedModelError: when there is no tower or no language model under a known name.
    """
    base = getattr(model, "base_model", model)
    tower = tower_of(base)
    language_model = _first(base, ("language_model", "text_model"))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if tower is None or language_model is None or head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no tower, language model or head under a known name "
            f"(towers: {', '.join(_TOWERS)}); its stages cannot be timed."
        )
    connector = _first(base, _CONNECTORS)
    nested = connector is None
    if nested:
        connector = _first(tower, _CONNECTORS)
    return Parts(tower, connector, language_model, head, nested)


def tower_of(base: nn.Module) -> nn.Module | None:
    """The vision tower of a VLM without its head; None where there is none under a known name."""
    return _first(base, _TOWERS)


def _first(base: Any, names: tuple[str, ...]) -> nn.Module | None:
    return next((getattr(base, name) for name in names if hasattr(base, name)), None)


@dataclass
class Trace:
    """What the hooks saw during one call.

    Attributes:
        marks: {part: [(begin, end), ...]} one pair per run of the module.
        connector_tokens: rows that went through the connector.
        embeddings: [B, L, d] what the language model received last; empty when not kept.
    """

    marks: dict[str, list[tuple[Mark, Mark]]] = field(default_factory=dict)
    connector_tokens: int = 0
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0))

    def seconds(self, clock: Clock, name: str) -> float:
        """Time inside a part, over all its runs."""
        return sum(clock.seconds(begin, end) for begin, end in self.marks.get(name, ()))


@contextmanager
def traced(model_parts: Parts, clock: Clock, keep_embeddings: bool = False) -> Iterator[Trace]:
    """Record when each part begins and ends, in the body of the `with`.

    The hooks are the innermost ones: what other hooks on the same module do counts as outside.

    Args:
        model_parts: what to watch.
        clock: takes the marks.
        keep_embeddings: whether the trace holds on to the language model's input.
    """
    trace = Trace()
    with ExitStack() as stack:
        for name, module in model_parts.named().items():
            for hook in _watch(name, module, trace, clock, keep_embeddings):
                stack.callback(hook.remove)
        yield trace


def _watch(name: str, module: nn.Module, trace: Trace, clock: Clock, embeddings: bool) -> list[Any]:
    begun: list[Mark] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name == "connector":
            trace.connector_tokens += _rows((*args, *kwargs.values()))
        if name == "language_model" and embeddings:
            trace.embeddings = kwargs["inputs_embeds"].detach()
        begun.append(clock.mark())

    def after(_module: nn.Module, _args: Any, _output: Any) -> None:
        trace.marks.setdefault(name, []).append((begun.pop(), clock.mark()))

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, prepend=True),
    ]


def _rows(values: tuple[Any, ...]) -> int:
    features = next((v for v in values if isinstance(v, Tensor)), None)
    return 0 if features is None else features.numel() // features.shape[-1]


def timed_call(
    call: Callable[[], Any], model_parts: Parts, clock: Clock, keep_embeddings: bool = False
) -> tuple[dict[str, float], Trace, Any]:
    """Run a prefill once and take its time apart.

    Returns:
        Seconds {ttft, tower, selection, connector, prefill}, the trace, the call's return value.
        `prefill` is the language model and its head; `selection` is what remains: token selection
        (on a patched model), embedding look-up, placing the features, masks.
    """
    output: list[Any] = []
    with traced(model_parts, clock, keep_embeddings) as trace, torch.no_grad():
        ttft = clock.time(lambda: output.append(call()))
    named = {part: trace.seconds(clock, part) for part in model_parts.named()}
    connector = named.get("connector", 0.0)
    tower = named["tower"] - (connector if model_parts.nested else 0.0)
    prefill = named["language_model"] + named["head"]
    stages = {
        "ttft": ttft,
        "tower": tower,
        "selection": ttft - tower - connector - prefill,
        "connector": connector,
        "prefill": prefill,
    }
    return stages, trace, output[0]
